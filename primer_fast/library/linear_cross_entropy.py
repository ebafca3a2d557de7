"""The operators primer_fast::linear_cross_entropy and linear_cross_entropy_backward: the loss of each row.

linear_cross_entropy_kept and its backward are the same where the logits are kept for the gradients.
"""

import torch
from torch import Tensor

from primer_fast.backend import runs_triton
from primer_fast.kernels.linear_cross_entropy import linear_cross_entropy_bwd, linear_cross_entropy_fwd
from primer_fast.kernels.logits import Head
from primer_fast.kernels.prepared import prepared
from primer_fast.library.logits import as_they_are, chunked_bwd, chunked_fwd, like_kept, sums_dtype
from primer_fast.library.register import only, operator, present, spread


def forward(x, w, b, target, ignore_index, smoothing, keep=False):
    """x (N, D), w (V, D), b (V,) or None, target (N,) -> losses (N,), 0 for ignored rows, lse (2, N), and the logits
    that the Triton kernels ``keep`` for the gradients, or None.
    """
    if runs_triton(x):
        return _forward(x, w, b, target, ignore_index, smoothing, keep, torch.get_float32_matmul_precision())
    with as_they_are(x):
        return *chunked_fwd(x, w, b, target, Head(1.0, smoothing, ignore_index, -1.0), False)[:2], None


def gradients(dlosses, x, w, b, target, lse, ignore_index, smoothing, needed, kept=None):
    """dlosses (N,) and the forward's arguments and results -> dx, dw, db, None for each that is not needed."""
    if runs_triton(x):
        precision = torch.get_float32_matmul_precision()
        return _gradients(dlosses, x, w, b, target, lse, kept, ignore_index, smoothing, tuple(needed), precision)
    dlosses = torch.where(target != ignore_index, dlosses, 0)
    with as_they_are(x):
        return chunked_bwd(-dlosses, None, x, w, b, target, lse, None, Head(smoothing=smoothing), needed)


@prepared(4)
def _forward(x, w, b, target, ignore_index, smoothing, keep, precision):
    return linear_cross_entropy_fwd(x, w, b, target, ignore_index, smoothing, precision, keep=keep)


@prepared(7)
def _gradients(dlosses, x, w, b, target, lse, kept, ignore_index, smoothing, needed, precision):
    dlosses = torch.where(target != ignore_index, dlosses, 0)
    return linear_cross_entropy_bwd(dlosses, x, w, b, target, lse, smoothing, needed, precision, kept=kept)


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
