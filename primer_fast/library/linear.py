"""The operators primer_fast::linear and linear_backward."""

import torch
from torch import Tensor

from primer_fast.kernels.activation import FROM_OUTPUT
from primer_fast.kernels.linear import linear_bwd, linear_fwd
from primer_fast.kernels.prepared import prepared
from primer_fast.library.register import absent, as_rows, check_kept, like_rows_of, only, operator, present, spread


def forward(x, w, b, activation, keep):
    """x (..., K), w (N, K), b (N,) or None -> y (..., N), what the backward needs beside x and w or None."""
    return _forward(x, w, b, activation, keep, torch.get_float32_matmul_precision())


def gradients(dy, saved, x, w, activation, needed):
    """dy (..., N) -> dx, dw, db, None for each that is not needed."""
    return _gradients(dy, saved, x, w, activation, tuple(needed), torch.get_float32_matmul_precision())


@prepared(3)
def _forward(x, w, b, activation, keep, precision):
    b = b if b is None else b.contiguous()
    return like_rows_of(x, *linear_fwd(as_rows(x), w, b, activation, keep, precision))


@prepared(4)
def _gradients(dy, saved, x, w, activation, needed, precision):
    saved = saved if saved is None else as_rows(saved)
    dx, dw, db = linear_bwd(as_rows(dy), saved, as_rows(x), w, activation, needed, precision)
    return *like_rows_of(x, dx), dw, db


known = _forward.known


@operator("linear")
def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, keep: bool
) -> tuple[Tensor, Tensor]:
    y, saved = forward(input, weight, bias, activation, keep)
    return y, present(saved, y)


@linear.register_fake
def _(input, weight, bias, activation, keep):
    y = input.new_empty(input.shape[0], weight.shape[0])
    derivative = keep and activation is not None and activation not in FROM_OUTPUT
    return y, torch.empty_like(y) if derivative else absent(y)


@operator("linear_backward")
def linear_backward(
    dy: Tensor, saved: Tensor | None, input: Tensor, weight: Tensor, activation: str | None, needed: list[bool]
) -> list[Tensor]:
    return only(gradients(dy, saved, input, weight, activation, needed), needed)


@linear_backward.register_fake
def _(dy, saved, input, weight, activation, needed):
    return only([dy.new_empty(s) for s in (input.shape, weight.shape, weight.shape[:1])], needed)


def _setup(ctx, inputs, output):
    x, w, _, activation, keep = inputs
    y, saved = output
    check_kept("linear", keep)
    ctx.mark_non_differentiable(saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, w, None if activation is None else y if activation in FROM_OUTPUT else saved)
    ctx.activation = activation


def _backward(ctx, dy, _):
    x, w, saved = ctx.saved_tensors
    needed = ctx.needs_input_grad[:3]
    grads = linear_backward(dy, saved, x, w, ctx.activation, needed)
    return *spread(grads, needed), None, None


linear.register_autograd(_backward, setup_context=_setup)
