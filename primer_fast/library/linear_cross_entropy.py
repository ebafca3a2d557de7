"""The operators primer_fast::linear_cross_entropy and linear_cross_entropy_backward: the loss of each row.

linear_cross_entropy_kept and its backward are the same where the logits are kept for the gradients.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from primer_fast.backend import has_kernels
from primer_fast.kernels.linear_cross_entropy import linear_cross_entropy_bwd, linear_cross_entropy_fwd
from primer_fast.kernels.logits import Head
from primer_fast.kernels.prepared import prepared
from primer_fast.kernels.row_losses import reduce_losses
from primer_fast.library.logits import as_they_are, chunked_bwd, chunked_fwd, like_kept, rows_of, sums_dtype
from primer_fast.library.register import only, operator, present, spread


def forward(x, w, b, target, ignore_index, smoothing, keep=False):
    """x (N, D), w (V, D), b (V,) or None, target (N,) -> losses (N,), 0 for ignored rows, lse (2, N), and the logits
    that the Triton kernels ``keep`` for the gradients, or None.
    """
    if has_kernels(x):
        return _forward(x, w, b, target, ignore_index, smoothing, keep, torch.get_float32_matmul_precision())
    with as_they_are(x):
        return *chunked_fwd(x, w, b, target, Head(1.0, smoothing, ignore_index, -1.0), False)[:2], None


def gradients(dlosses, x, w, b, target, lse, ignore_index, smoothing, needed, kept=None):
    """dlosses (N,) and the forward's arguments and results -> dx, dw, db, None for each that is not needed."""
    if has_kernels(x):
        precision = torch.get_float32_matmul_precision()
        own = ignore_index, smoothing, tuple(needed), precision
        return _gradients(dlosses, x, w, b, target, lse, None, kept, *own)
    head = Head(1.0, smoothing, ignore_index)
    with as_they_are(x):
        return chunked_bwd(-dlosses, None, x, w, b, target, lse, None, head, needed)


@prepared(4)
def _forward(x, w, b, target, ignore_index, smoothing, keep, precision):
    return linear_cross_entropy_fwd(x, w, b, target, ignore_index, smoothing, precision, keep=keep)


@prepared(8)
def _gradients(dloss, x, w, b, target, lse, number, kept, ignore_index, smoothing, needed, precision):
    rows, target, b = rows_of(x, target, b)
    dx, dw, db = linear_cross_entropy_bwd(
        dloss if dloss.dim() == 0 else dloss.reshape(-1), rows, w, b, target, lse, smoothing, needed, precision,
        kept=kept, ignore_index=ignore_index, number=number,
    )  # fmt: skip
    return dx if dx is None else dx.view(x.shape), dw, db


class Reduced(NamedTuple):
    """What ``loss`` is told beside its tensors."""

    reduction: str
    ignore_index: int
    smoothing: float
    dtype: torch.dtype  # of the loss
    keep: bool  # the logits, for the gradients


def loss(x, w, b, target, options: Reduced):
    """x (..., D), w (V, D), b (V,) or None, target (...) -> loss () or as target, then what ``loss_gradients`` needs:
    lse, the number of rows in a mean or None, the logits or None.
    """
    if has_kernels(x):
        return _loss(x, w, b, target, options, torch.get_float32_matmul_precision())
    rows, flat, b = rows_of(x, target, b)
    losses, lse, kept = forward(rows, w, b, flat, options.ignore_index, options.smoothing)
    reduced, number = reduce(losses, flat, options.reduction, options.ignore_index)
    return (reduced.view(target.shape) if reduced.dim() else reduced).to(options.dtype), lse, number, kept


@prepared(4)
def _loss(x, w, b, target, options, precision):
    rows, flat, b = rows_of(x, target, b)
    losses, lse, kept = linear_cross_entropy_fwd(
        rows, w, b, flat, options.ignore_index, float(options.smoothing), precision, keep=options.keep
    )  # fmt: skip
    if options.reduction == "none":
        return losses.view(target.shape).to(options.dtype), lse, None, kept
    mean = options.reduction == "mean"
    reduced, number = reduce_losses(losses, flat, options.ignore_index, mean, options.dtype)
    return reduced, lse, number, kept


known = _loss.known


def reduce(losses, target, reduction, ignore_index):
    """-> loss () or (N,), and the number of rows in a mean, through torch's own operators"""
    if reduction == "none":
        return losses, None
    if reduction == "sum":
        return losses.sum(), None
    number = (target != ignore_index).sum()
    return losses.sum() / number, number


def loss_gradients(dloss, x, w, b, target, lse, number, kept, options: Reduced, needed):
    """dloss as the loss, and ``loss``'s arguments and results -> dx, dw, db, None for each that is not needed."""
    if has_kernels(x):
        precision = torch.get_float32_matmul_precision()
        own = options.ignore_index, options.smoothing, tuple(needed)
        return _gradients(dloss, x, w, b, target, lse, number, kept, *own, precision)
    rows, flat, b = rows_of(x, target, b)
    dlosses = dloss.reshape(-1).to(lse.dtype)
    dlosses = dlosses if number is None else dlosses / number
    dx, dw, db = gradients(dlosses, rows, w, b, flat, lse, options.ignore_index, options.smoothing, needed)
    return dx if dx is None else dx.view(x.shape), dw, db


@operator("linear_cross_entropy")
def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor,
    ignore_index: int, label_smoothing: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return forward(input, linear_weight, linear_bias, target, ignore_index, label_smoothing)[:2]


@linear_cross_entropy.register_fake
def _(input, linear_weight, linear_bias, target, ignore_index, label_smoothing):
    losses = input.new_empty(input.shape[0], dtype=sums_dtype(input))
    return losses, losses.new_empty(2, input.shape[0])


@operator("linear_cross_entropy_backward")
def linear_cross_entropy_backward(
    dlosses: Tensor, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, lse: Tensor,
    ignore_index: int, label_smoothing: float, needed: list[bool],
) -> list[Tensor]:  # fmt: skip
    grads = gradients(
        dlosses, input, linear_weight, linear_bias, target, lse, ignore_index, label_smoothing, needed
    )  # fmt: skip
    return only(grads, needed)


@linear_cross_entropy_backward.register_fake
def _(dlosses, input, linear_weight, linear_bias, target, lse, ignore_index, label_smoothing, needed):
    return only([input.new_empty(s) for s in (input.shape, linear_weight.shape, linear_weight.shape[:1])], needed)


def _setup(ctx, inputs, output):
    x, w, b, target, ctx.ignore_index, ctx.smoothing = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, w, b, target, output[1])


def _backward(ctx, dlosses, _):
    needed = ctx.needs_input_grad[:3]
    grads = linear_cross_entropy_backward(dlosses, *ctx.saved_tensors, ctx.ignore_index, ctx.smoothing, needed)
    return *spread(grads, needed), None, None, None


linear_cross_entropy.register_autograd(_backward, setup_context=_setup)


@operator("linear_cross_entropy_reduced")
def linear_cross_entropy_reduced(losses: Tensor, target: Tensor, ignore_index: int, mean: bool) -> Tensor:
    """The sum of the losses (N,), or their mean over the rows that count: as ``loss`` adds them, bit by bit."""
    if has_kernels(losses):
        return reduce_losses(losses, target, ignore_index, mean, losses.dtype)[0]
    return reduce(losses, target, "mean" if mean else "sum", ignore_index)[0]


@linear_cross_entropy_reduced.register_fake
def _(losses, target, ignore_index, mean):
    return losses.new_empty(())


def _setup_reduced(ctx, inputs, output):
    _, target, ctx.ignore_index, ctx.mean = inputs
    ctx.save_for_backward(target)


def _backward_reduced(ctx, dloss):
    (target,) = ctx.saved_tensors
    dloss = dloss / (target != ctx.ignore_index).sum() if ctx.mean else dloss
    return dloss.expand(target.shape), None, None, None


linear_cross_entropy_reduced.register_autograd(_backward_reduced, setup_context=_setup_reduced)


@operator("linear_cross_entropy_kept")
def linear_cross_entropy_kept(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor,
    ignore_index: int, label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    losses, lse, logits = forward(
        input, linear_weight, linear_bias, target, ignore_index, label_smoothing, keep=True
    )  # fmt: skip
    return losses, lse, present(logits, losses)


@linear_cross_entropy_kept.register_fake
def _(input, linear_weight, linear_bias, target, ignore_index, label_smoothing):
    losses = input.new_empty(input.shape[0], dtype=sums_dtype(input))
    return losses, losses.new_empty(2, input.shape[0]), like_kept(input, linear_weight)


@operator("linear_cross_entropy_kept_backward")
def linear_cross_entropy_kept_backward(
    dlosses: Tensor, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, lse: Tensor,
    logits: Tensor, ignore_index: int, label_smoothing: float, needed: list[bool],
) -> list[Tensor]:  # fmt: skip
    grads = gradients(
        dlosses, input, linear_weight, linear_bias, target, lse, ignore_index, label_smoothing, needed, logits
    )  # fmt: skip
    return only(grads, needed)


@linear_cross_entropy_kept_backward.register_fake
def _(dlosses, input, linear_weight, linear_bias, target, lse, logits, ignore_index, label_smoothing, needed):
    return only([input.new_empty(s) for s in (input.shape, linear_weight.shape, linear_weight.shape[:1])], needed)


def _setup_kept(ctx, inputs, output):
    x, w, b, target, ctx.ignore_index, ctx.smoothing = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, w, b, target, *output[1:])


def _backward_kept(ctx, dlosses, *_):
    needed = ctx.needs_input_grad[:3]
    grads = linear_cross_entropy_kept_backward(dlosses, *ctx.saved_tensors, ctx.ignore_index, ctx.smoothing, needed)
    return *spread(grads, needed), None, None, None


linear_cross_entropy_kept.register_autograd(_backward_kept, setup_context=_setup_kept)
