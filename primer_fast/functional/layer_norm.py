"""Differentiable layer normalisation of a residual sum: checks here, math in kernels/layer_norm.py."""

__all__ = ["layer_norm", "layer_norm_plain"]

import math
from collections.abc import Sequence
from typing import Literal, overload

import torch
import torch.nn.functional as torch_F
from torch import Tensor

from primer_fast.backend import jit_traces, prepares, runs_triton, sharded, wants_gradient
from primer_fast.functional.checks import check_alike, check_tensors
from primer_fast.functional.operator import check_kept, differentiable, differentiates, gradients_of, operator
from primer_fast.kernels.launch.prepared import prepared
from primer_fast.kernels.layer_norm import layer_norm_bwd, layer_norm_fwd


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
    options = eps, dtype, keep_sum, keep
    if prepares(input):
        plan = _launch.known(*leaves, shape, *options)
        if plan is not None:
            results = _apply(*leaves, (math.prod(shape), *options), plan) if keep else plan(*leaves)
            return _asked(results, input, residual, return_residual)
    if jit_traces():
        return layer_norm_plain(input, shape, weight, bias, eps, residual=residual, return_residual=return_residual)
    _check(input, shape, weight, bias, residual, to_float32)
    if not isinstance(eps, int | float):
        raise TypeError(f"layer_norm: eps must be a number; got {eps!r}")
    if sharded(input):
        from primer_fast.functional import shards

        whole = residual is not None
        run = lambda x, r, w, b: layer_norm(x, shape, w, b, eps, residual=r, return_residual=whole)  # noqa: E731
        results = shards.layer_norm(run, leaves, len(shape))
        return (results[0], results[1] if whole else input) if return_residual else results[0]
    if not (runs_triton(input) and (residual is None or runs_triton(residual))):
        return layer_norm_plain(input, shape, weight, bias, eps, residual=residual, return_residual=return_residual)
    results = _call(keep, *leaves, math.prod(shape), *options)
    return _asked(results, input, residual, return_residual)


def _asked(results, input, residual, return_residual):
    """What the caller gets: y, or y and the sum. results: y, or y, the sum and what was kept for the backward."""
    y, s = (results, input) if isinstance(results, Tensor) else results[:2]
    return (y, input if residual is None else s) if return_residual else y


@prepared(4)
def _launch(input, residual, weight, bias, shape, eps, dtype, keep_sum, keep):
    """shape: of a row, as the caller has checked it."""
    elements = math.prod(shape)
    return layer_norm_fwd(input, residual, weight, bias, elements, eps, dtype=dtype, keep_sum=keep_sum, keep=keep)


@prepared(7)
def _launch_backward(dy, dsum, total, mean, rstd, weight, bias, elements, needed):
    need_total, need_weight, need_bias = needed
    ds, dw, db = layer_norm_bwd(
        dy, dsum, total, mean, rstd, weight, elements, dtype=total.dtype if need_total else None,
        dweight=weight.dtype if need_weight else None, dbias=bias.dtype if need_bias else None,
    )  # fmt: skip
    return ds, *(t if t is None else t.view(like.shape) for t, like in ((dw, weight), (db, bias)))


@operator("layer_norm")
def _forward(
    input: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    elements: int, eps: float, dtype: torch.dtype | None, keep_sum: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> y, input + residual, mean, 1 / deviation; elements: of a row, which is normalised"""
    return _launch(input, residual, weight, bias, (elements,), eps, dtype, keep_sum, keep)


@_forward.register_fake
def _(input, residual, weight, bias, elements, eps, dtype, keep_sum, keep):
    of_sum = input.dtype if residual is None else torch.promote_types(input.dtype, residual.dtype)
    y = input.new_empty(input.shape, dtype=dtype or of_sum)
    total = input.new_empty(input.shape, dtype=of_sum) if keep_sum and residual is not None else None
    rows = input.numel() // elements if keep else 0
    return y, total, *(input.new_empty(rows, dtype=torch.float32) if keep else None for _ in range(2))


@operator("layer_norm_backward")
def _gradients(
    dy: Tensor, dsum: Tensor | None, total: Tensor | None, mean: Tensor, rstd: Tensor,
    weight: Tensor | None, bias: Tensor | None, elements: int, needed: list[bool],
) -> list[Tensor]:  # fmt: skip
    """-> gradients of the sum, weight, bias. total: the sum, or None where the bias' gradient alone is needed."""
    return _launch_backward(dy, dsum, total, mean, rstd, weight, bias, elements, tuple(needed))


@_gradients.register_fake
def _(dy, dsum, total, mean, rstd, weight, bias, elements, needed):
    of = (dy.shape, total), *((None if t is None else t.shape, t) for t in (weight, bias))
    return [None if t is None else dy.new_empty(shape, dtype=t.dtype) for shape, t in of]


def _chosen(inputs, output):
    """y, and with a residual the sum: a result even if unused, so that autograd links later uses of it."""
    return output[:2] if inputs[1] is not None and inputs[7] else output[0]


def _setup(ctx, inputs, output):
    x, residual, w, b, ctx.elements, ctx.eps, ctx.dtype, keep_sum, _ = inputs
    _, total, mean, rstd = output
    check_kept("layer_norm", keep_sum or residual is None or not any(ctx.needs_input_grad[:3]))
    ctx.set_materialize_grads(False)
    ctx.dtypes = [None if t is None else t.dtype for t in (x, residual)]
    ctx.save_for_backward(x if residual is None else total if keep_sum else None, w, b, mean, rstd)


def _backward(ctx, dy, dsum=None):
    s, w, b, mean, rstd = ctx.saved_tensors
    need_x, need_residual, *tables = ctx.needs_input_grad[:4]
    needed = need_x or need_residual, *tables
    if dy is None:  # y was not used
        ds, dw, db = dsum, None, None
    elif differentiates(dy, dsum):
        s = torch.zeros_like(dy) if s is None else s  # not kept where the bias alone has a gradient
        shape = _trailing(s.shape, ctx.elements, w, b)
        plain = lambda: _normalize_plain(s, shape, w, b, ctx.eps, ctx.dtype)  # noqa: E731
        ds, dw, db = gradients_of(plain, (s, w, b), needed, dy)
        ds = ds if ds is None or dsum is None else ds + dsum
    else:
        ds, dw, db = _gradients(dy, dsum, s, mean, rstd, w, b, ctx.elements, needed)
    dx = ds.to(ctx.dtypes[0]) if need_x and ds is not None else None
    dresidual = ds.to(ctx.dtypes[1]) if need_residual and ds is not None else None
    return dx, dresidual, dw, db


def _trailing(shape, elements, *tables):
    """The axes of a row: the shape of a table, or as many last axes as have ``elements`` elements together."""
    for table in tables:
        if table is not None:
            return tuple(table.shape)
    axes = 1
    while math.prod(shape[-axes:]) != elements:
        axes += 1
    return tuple(shape[-axes:])


_call, _apply = differentiable(_forward, _setup, _backward, 4, _chosen)


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
    named = {"input": input, "residual": residual, "weight": weight, "bias": bias}
    check_tensors("layer_norm", named, optional=("residual", "weight", "bias"))
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
    check_alike("layer_norm", named, dtypes=False)
    for name, t in (("weight", weight), ("bias", bias)):
        if t is None:
            continue
        if t.shape != shape:
            raise ValueError(f"layer_norm: {name} must have shape {shape}, normalized_shape; got {tuple(t.shape)}")
        narrow = dtype in (torch.float16, torch.bfloat16)
        if not (any_dtype or t.dtype == dtype or (narrow and t.dtype == torch.float32)):
            raise TypeError(
                f"layer_norm: {name} must have the dtype of input + residual, or float32 beside 16 bits; "
                f"got {t.dtype} and {dtype}"
            )
