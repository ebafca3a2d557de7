"""Checks of arguments that several ops share. A message names the op, what must hold and what came."""

__all__ = ["check_alike", "check_tensors", "pair"]

import operator
from collections.abc import Container
from typing import Any

from torch import Tensor


def check_tensors(op: str, named: dict[str, Any], optional: Container[str] = ()) -> None:
    """Raise TypeError where one is no tensor; those named in ``optional`` may be None."""
    for name, t in named.items():
        if not isinstance(t, Tensor) and (t is not None or name not in optional):
            raise TypeError(f"{op}: {name} must be a tensor; got {type(t).__name__}")


def check_alike(op: str, named: dict[str, Tensor | None], dtypes: bool = True) -> None:
    """Raise ValueError where a tensor is on another device than the first, TypeError where its dtype is another."""
    (first, like), *others = named.items()
    assert like is not None
    for name, t in others:
        if t is None:
            continue
        if t.device != like.device:
            raise ValueError(f"{op}: all tensors must be on one device; got {first} {like.device}, {name} {t.device}")
        if dtypes and t.dtype != like.dtype:
            raise TypeError(f"{op}: all tensors must have one dtype; got {first} {like.dtype} and {name} {t.dtype}")


def pair(op: str, name: str, value: Any) -> tuple[int, int]:
    """An integer, or a sequence of one or two, as torch takes them -> a pair. Anything else raises."""
    if type(value) is int:
        return value, value
    try:
        given = tuple(value) if isinstance(value, tuple | list) else (value,)
        if any(isinstance(v, bool) for v in given):
            raise TypeError
        numbers = tuple(operator.index(v) for v in given)
    except TypeError:
        raise TypeError(f"{op}: {name} must be an int or a pair of ints; got {value!r}") from None
    if len(numbers) not in (1, 2):
        raise ValueError(f"{op}: {name} must be an int or a pair of ints; got {value!r}")
    return numbers[0], numbers[-1]
