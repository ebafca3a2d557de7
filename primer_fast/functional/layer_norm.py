"""Differentiable layer normalisation of a residual sum: checks here, math in kernels/layer_norm.py."""

__all__ = ["layer_norm", "layer_norm_plain"]

import math
from collections.abc import Sequence
from typing import Literal, overload

import torch
import torch.nn.functional as torch_F
from torch import Tensor

from primer_fast import library
from primer_fast.backend import (
    EAGER,
    apply_of,
    differentiates,
    gradients_of,
    jit_traces,
    needs_operator,
    prepares,
    runs_triton,
    sharded,
    wants_gradient,
)


class _LayerNorm(torch.autograd.Function):
    """-> y, and s = x + residual where there is a residual: an output even if unused, so that it knows its history."""

    @staticmethod
    def forward(ctx, run, x, residual, w, b, shape, eps, dtype):
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.eps, ctx.dtype = shape, eps, dtype
        ctx.dtypes = [None if t is None else t.dtype for t in (x, residual)]
        y, s, mean, rstd = run(x, residual, w, b)
        ctx.save_for_backward(x if residual is None else s, w, b, mean, rstd)
        return y if residual is None else (y, s)

    @staticmethod
    def backward(ctx, dy, dsum=None):
        s, w, b, mean, rstd = ctx.saved_tensors
        need = ctx.needs_input_grad[1:5]
        need_s = need[0] or need[1]
        if dy is None:  # y was not used
            ds, dw, db = dsum, None, None
        elif differentiates(dy, dsum):
            ds, dw, db = _differentiable_grads(s, w, b, ctx, dy, dsum, (need_s, *need[2:]))
        else:
            needed = (need_s, *need[2:])
            ds, dw, db = library.layer_norm.gradients(dy, dsum, s, mean, rstd, w, b, ctx.shape, needed)
        dx = ds.to(ctx.dtypes[0]) if need[0] and ds is not None else None
        dresidual = ds.to(ctx.dtypes[1]) if need[1] and ds is not None else None
        return None, dx, dresidual, dw, db, None, None, None


_apply = apply_of(_LayerNorm)


def _differentiable_grads(s, w, b, ctx, dy, dsum, needed):
    s = torch.zeros_like(dy) if s is None else s  # not kept where the bias alone has a gradient
    plain = lambda: _normalize_plain(s, ctx.shape, w, b, ctx.eps, ctx.dtype)  # noqa: E731
    ds, dw, db = gradients_of(plain, (s, w, b), needed, dy)
    return ds if ds is None or dsum is None else ds + dsum, dw, db


@overload
def layer_norm(
    input: Tensor, normalized_shape: int | Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5, *, residual: Tensor | None = None, return_residual: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def layer_norm(
    input: Tensor, normalized_shape: int | Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5, *, residual: Tensor | None = None, return_residual: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def layer_norm(
    input: Tensor, normalized_shape: int | Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5, *, residual: Tensor | None = None, return_residual: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def layer_norm(
    input: Tensor,  # (..., *normalized_shape)
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,  # normalized_shape
    bias: Tensor | None = None,  # normalized_shape
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,  # as input
    return_residual: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # as input; with return_residual also input + residual
    """``LayerNorm(input + residual)`` in one pass; the sum is the second output where ``return_residual`` asks for it.

    The sum is rounded to its dtype before it is normalised, as ``layer_norm(input + residual)`` does in PyTorch.
    Statistics and the sums of gradients are in float32; two runs are bitwise equal. The backward adds the gradient of
    the returned sum in the same pass, and input and residual share one gradient tensor.

    float32, float16 and bfloat16 on a GPU run in Triton; other devices and dtypes, and gradients that are themselves
    differentiated, take PyTorch's operators. ``weight`` and ``bias`` may be float32 beside a 16-bit input. Under
    autocast on a GPU the result is float32, as PyTorch's, without float32 copies of the arguments; autocast on a CPU
    leaves the dtype alone, as PyTorch does there.

    Raises:
        ValueError: ``normalized_shape`` is empty or not the last axes of input; weight, bias or residual have another
            shape; devices differ.
        TypeError: an argument has the wrong type; weight or bias have another dtype than the sum's or float32.

    Source: Ba, Kiros, Hinton, "Layer Normalization" (2016); the primer's LayerNorm(O + X).
    """
    shape = _shape(normalized_shape)
    leaves = (input, residual, weight, bias)
    to_float32 = isinstance(input, Tensor) and input.is_cuda and torch.is_autocast_enabled("cuda")
    dtype = torch.float32 if to_float32 else None
    keep = wants_gradient(*leaves)
    keep_sum = return_residual or (keep and residual is not None and wants_gradient(input, residual, weight))
    if prepares(input):
        plan = library.layer_norm.forward.known(*leaves, shape, eps, dtype, keep_sum, keep)
        if plan is not None:
            return _run(plan, leaves, shape, eps, dtype, keep, return_residual)
    if jit_traces():
        return layer_norm_plain(input, shape, weight, bias, eps, residual=residual, return_residual=return_residual)
    _check(input, shape, weight, bias, residual, to_float32)
    if not isinstance(eps, int | float):
        raise TypeError(f"layer_norm: eps must be a number; got {eps!r}")
    if type(input) not in EAGER and sharded(input):
        from primer_fast.functional import shards

        whole = residual is not None
        run = lambda x, r, w, b: layer_norm(x, shape, w, b, eps, residual=r, return_residual=whole)  # noqa: E731
        results = shards.layer_norm(run, leaves, len(shape))
        return (results[0], results[1] if whole else input) if return_residual else results[0]
    if not (runs_triton(input) and (residual is None or runs_triton(residual))):
        return layer_norm_plain(input, shape, weight, bias, eps, residual=residual, return_residual=return_residual)
    if needs_operator(*leaves):
        y, s, *_ = library.layer_norm.layer_norm(*leaves, math.prod(shape), eps, dtype, keep_sum, keep)
        return (y, input if residual is None else s) if return_residual else y
    run = lambda *leaves: library.layer_norm.forward(*leaves, shape, eps, dtype, keep_sum, keep)  # noqa: E731
    return _run(run, leaves, shape, eps, dtype, keep, return_residual)


def _run(run, leaves, shape, eps, dtype, keep, return_residual):
    input, residual, *_ = leaves
    if not keep:
        y, s, _, _ = run(*leaves)
    elif residual is None:
        y, s = _apply(run, *leaves, shape, eps, dtype), input
    else:
        y, s = _apply(run, *leaves, shape, eps, dtype)
    return (y, input if residual is None else s) if return_residual else y


def layer_norm_plain(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    return_residual: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The same through torch's own operators."""
    shape = _shape(normalized_shape)
    total = input if residual is None else input + residual
    kinds = {t.dtype for t in (weight, bias) if t is not None}
    mixed = len(kinds) > 1 or (weight is None and kinds not in (set(), {total.dtype}))  # torch fails, or its gradient
    narrow = total.dtype in (torch.float16, torch.bfloat16) and wants_gradient(weight, bias)  # see sums_narrowly
    if mixed or narrow:
        y = _normalize_plain(total, shape, weight, bias, eps, total.dtype)
    else:
        y = torch_F.layer_norm(total, shape, weight, bias, eps)
    return (y, total) if return_residual else y


def _shape(normalized_shape) -> tuple:
    if isinstance(normalized_shape, int):
        return (normalized_shape,)
    if not isinstance(normalized_shape, Sequence) or isinstance(normalized_shape, str):
        raise TypeError(f"layer_norm: normalized_shape must be an integer or several; got {normalized_shape!r}")
    return tuple(normalized_shape)


def _normalize_plain(s, shape, w, b, eps, dtype):
    """torch's operator on the dtypes that the kernel takes, whatever the device; 16 bits in float32."""
    mixed = any(t is not None and t.dtype != s.dtype for t in (w, b)) or dtype not in (None, s.dtype)
    if not mixed and s.dtype not in (torch.float16, torch.bfloat16):
        return torch_F.layer_norm(s, shape, w, b, eps)
    w, b = (t if t is None else t.float() for t in (w, b))
    return torch_F.layer_norm(s.float(), shape, w, b, eps).to(dtype or s.dtype)


def _check(input, shape, weight, bias, residual, any_dtype):
    named = (("input", input), ("residual", residual), ("weight", weight), ("bias", bias))
    for name, t in named:
        if not isinstance(t, Tensor) and (t is not None or name == "input"):
            raise TypeError(f"layer_norm: {name} must be a tensor; got {type(t).__name__}")
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in shape):
        raise TypeError(f"layer_norm: normalized_shape must be an integer or several; got {shape}")
    if not shape or input.shape[-len(shape) :] != shape:
        raise ValueError(
            "layer_norm: normalized_shape must be the last axes of input, at least one; "
            f"got {shape} and input {tuple(input.shape)}"
        )
    if not input.is_floating_point():
        raise TypeError(f"layer_norm: input must hold floating-point numbers; got {input.dtype}")
    if residual is not None and (residual.shape != input.shape or not residual.is_floating_point()):
        raise ValueError(
            "layer_norm: residual must be floating-point, of input's shape; "
            f"got {residual.dtype} {tuple(residual.shape)} and input {tuple(input.shape)}"
        )
    dtype = input.dtype if residual is None else torch.promote_types(input.dtype, residual.dtype)
    for name, t in named[1:]:
        if t is None:
            continue
        if t.device != input.device:
            raise ValueError(
                f"layer_norm: all tensors must be on one device; got input {input.device}, {name} {t.device}"
            )
        if name == "residual":
            continue
        if t.shape != shape:
            raise ValueError(f"layer_norm: {name} must have shape {shape}, normalized_shape; got {tuple(t.shape)}")
        narrow = dtype in (torch.float16, torch.bfloat16)
        if not (any_dtype or t.dtype == dtype or (narrow and t.dtype == torch.float32)):
            raise TypeError(
                f"layer_norm: {name} must have the dtype of input + residual, or float32 beside 16 bits; "
                f"got {t.dtype} and {dtype}"
            )
