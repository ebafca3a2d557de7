"""The operators primer_fast::layer_norm and layer_norm_backward."""

import math

import torch
from torch import Tensor

from primer_fast.kernels.layer_norm import layer_norm_bwd, layer_norm_fwd
from primer_fast.kernels.prepared import prepared
from primer_fast.library.register import absent, check_kept, only, operator, present, spread


@prepared(4)
def forward(input, residual, weight, bias, shape, eps, dtype, keep_sum, keep):
    """-> y, input + residual, mean, 1 / deviation, None for each that is not kept; shape: of a row."""
    elements = math.prod(shape)
    return layer_norm_fwd(input, residual, weight, bias, elements, eps, dtype=dtype, keep_sum=keep_sum, keep=keep)


@prepared(7)
def gradients(dy, dsum, total, mean, rstd, weight, bias, shape, needed):
    """dy, dsum (..., *shape), dsum or None -> gradients of the sum, weight (*shape), bias (*shape), None unless needed.

    total: the sum; it may be None where the bias' gradient alone is needed.
    """
    need_total, need_weight, need_bias = needed
    ds, dw, db = layer_norm_bwd(
        dy, dsum, total, mean, rstd, weight, math.prod(shape), dtype=total.dtype if need_total else None,
        dweight=weight.dtype if need_weight else None, dbias=bias.dtype if need_bias else None,
    )  # fmt: skip
    return ds, *(t if t is None else t.view(shape) for t in (dw, db))


@operator("layer_norm")
def layer_norm(
    input: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    elements: int, eps: float, dtype: torch.dtype | None, keep_sum: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> y, input + residual, mean, 1 / deviation; elements: of a row, which is normalised"""
    y, total, mean, rstd = forward(input, residual, weight, bias, (elements,), eps, dtype, keep_sum, keep)
    return y, present(total, y), present(mean, y), present(rstd, y)


@layer_norm.register_fake
def _(input, residual, weight, bias, elements, eps, dtype, keep_sum, keep):
    of_sum = input.dtype if residual is None else torch.promote_types(input.dtype, residual.dtype)
    y = input.new_empty(input.shape, dtype=dtype or of_sum)
    total = input.new_empty(input.shape, dtype=of_sum) if keep_sum and residual is not None else absent(y)
    rows = input.numel() // elements if keep else 0
    return y, total, *(input.new_empty(rows, dtype=torch.float32 if keep else y.dtype) for _ in range(2))


@operator("layer_norm_backward")
def layer_norm_backward(
    dy: Tensor, dsum: Tensor | None, total: Tensor | None, mean: Tensor, rstd: Tensor,
    weight: Tensor | None, bias: Tensor | None, elements: int, needed: list[bool],
) -> list[Tensor]:  # fmt: skip
    return only(gradients(dy, dsum, total, mean, rstd, weight, bias, (elements,), tuple(needed)), needed)


@layer_norm_backward.register_fake
def _(dy, dsum, total, mean, rstd, weight, bias, elements, needed):
    need_total, need_weight, need_bias = needed
    grads = [dy.new_empty(dy.shape, dtype=total.dtype)] if need_total else []
    tables = [t for t, need in ((weight, need_weight), (bias, need_bias)) if need]
    return grads + [dy.new_empty(elements, dtype=t.dtype) for t in tables]


def _setup(ctx, inputs, output):
    x, residual, weight, bias, ctx.elements, _, _, keep_sum, keep = inputs
    _, total, mean, rstd = output
    check_kept("layer_norm", keep and (keep_sum or residual is None or not any(ctx.needs_input_grad[:3])))
    ctx.mark_non_differentiable(mean, rstd, *(() if keep_sum and residual is not None else (total,)))
    ctx.set_materialize_grads(False)
    of_sum = x if residual is None else total if keep_sum else None
    ctx.save_for_backward(of_sum, weight, bias, mean, rstd)
    ctx.dtypes = [t if t is None else t.dtype for t in (x, residual)]


def _backward(ctx, dy, dsum, *_):
    total, weight, bias, mean, rstd = ctx.saved_tensors
    need_x, need_residual, *tables = ctx.needs_input_grad[:4]
    needed = [need_x or need_residual, *tables]
    if dy is None:  # y was not used
        ds, dw, db = dsum, None, None
    else:
        grads = layer_norm_backward(dy, dsum, total, mean, rstd, weight, bias, ctx.elements, needed)
        ds, dw, db = spread(grads, needed)
        dw, db = (g if g is None else g.view(t.shape) for g, t in ((dw, weight), (db, bias)))
    dx, dresidual = (
        ds.to(dtype) if ds is not None and need else None
        for need, dtype in zip((need_x, need_residual), ctx.dtypes, strict=True)
    )
    return dx, dresidual, dw, db, *(None,) * 5


layer_norm.register_autograd(_backward, setup_context=_setup)
