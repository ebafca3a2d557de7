"""What all registered operators share."""

import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd import forward_ad

from primer_fast.backend import tangents


def operator(name: str) -> Callable:
    """Decorator: the function becomes the operator primer_fast::name; its annotations are the schema.

    The operator raises NotImplementedError where an argument has a tangent: it would give a result without one.
    """

    def register(function):
        @functools.wraps(function)
        def without_tangents(*args):
            if tangents():
                _refuse_tangents(name, args)
            return function(*args)

        return torch.library.custom_op(f"primer_fast::{name}", mutates_args=())(without_tangents)

    return register


def _refuse_tangents(name: str, args: tuple) -> None:
    given = [t for a in args for t in (a if isinstance(a, list | tuple) else (a,)) if isinstance(t, Tensor)]
    if any(forward_ad.unpack_dual(t).tangent is not None for t in given if t.is_floating_point()):
        raise NotImplementedError(
            f"primer_fast::{name}: tensors must have no tangent, the operator has no forward derivative; "
            f"call primer_fast.functional, uncompiled"
        )


def absent(like: Tensor) -> Tensor:
    """Stands for None among the results of an operator, which must all be tensors."""
    return like.new_empty(0)


def present(t: Tensor | None, *others: Tensor) -> Tensor:
    """``t``, or the stand-in where it is None or one of the other results, which it may not alias."""
    return absent(others[0]) if t is None or any(t is other for other in others) else t


def as_rows(t: Tensor) -> Tensor:
    """(..., n) -> (M, n)"""
    return t if t.dim() == 2 else t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def like_rows_of(x, *results):
    """(M, n) -> with the leading axes of ``x``; None stays None."""
    return tuple(t if t is None or x.dim() == 2 else t.view(*x.shape[:-1], t.shape[-1]) for t in results)


def only(grads, needed) -> list[Tensor]:
    """The gradients that are needed, as an operator returns them."""
    return [grad for grad, need in zip(grads, needed, strict=True) if need]


def spread(grads, needed) -> list[Tensor | None]:
    """Back from ``only``: None for each that was not needed."""
    rest: Iterator[Tensor] = iter(grads)
    return [next(rest) if need else None for need in needed]


def check_kept(name: str, keep: bool) -> None:
    """Raise ValueError where a gradient will be asked of a call that kept nothing for it."""
    if not keep:
        raise ValueError(f"{name}: keep must be True where an argument requires a gradient; got {keep}")
