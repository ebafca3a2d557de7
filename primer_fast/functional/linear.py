"""Differentiable linear layer with bias and activation: checks and reshapes here, math in kernels/linear.py."""

__all__ = ["linear", "linear_plain"]

import torch
import torch.nn.functional as torch_F
from torch import Tensor

from primer_fast.backend import autocast, jit_traces, prepares, runs_triton, sharded, wants_gradient
from primer_fast.functional.activation import apply_plain, check_activation
from primer_fast.functional.checks import check_alike, check_tensors
from primer_fast.functional.operator import (
    as_rows,
    differentiable,
    differentiates,
    gradients_of,
    like_rows_of,
    operator,
)
from primer_fast.kernels.activation import FROM_OUTPUT, keeps_derivative
from primer_fast.kernels.launch.prepared import prepared
from primer_fast.kernels.linear import linear_bwd, linear_fwd


def linear(
    input: Tensor,  # (..., K)
    weight: Tensor,  # (N, K) or (K,)
    bias: Tensor | None = None,  # (N,), or () beside a weight of one axis
    *,
    activation: str | None = None,
) -> Tensor:  # (..., N), without its last axis where the weight has one axis
    """``activation(input @ weight.T + bias)`` in one kernel; the backward fuses the derivative and the bias gradient.

    float32, float16 and bfloat16 on a GPU run in Triton; float32 products follow
    ``torch.get_float32_matmul_precision()`` ("highest" is accurate to float32, on tensor cores). Other devices and
    dtypes, and gradients that are themselves differentiated, take PyTorch's operators. Sums are in float32; two runs
    are bitwise equal.

    Args:
        activation: None or one of ``primer_fast.functional.activation.ACTIVATIONS``.

    Raises:
        ValueError: the shapes or devices do not match, or ``activation`` is unknown.
        TypeError: an argument is not a tensor, or the dtypes differ.

    Source: the layer ``A_i = act(W_i A_{i-1} + b_i)`` of a multilayer perceptron, on rows instead of columns.
    """
    input, weight, bias = autocast(input, weight, bias)
    if prepares(input):
        keep = wants_gradient(input, weight, bias)
        plan = _launch.known(input, weight, bias, activation, keep, torch.get_float32_matmul_precision())
        if plan is not None:
            return _apply(input, weight, bias, (activation, keep), plan) if keep else plan(input, weight, bias)[0]
    check_activation("linear", activation)
    if jit_traces():
        return linear_plain(input, weight, bias, activation=activation)
    _check(input, weight, bias)
    if sharded(input) and weight.dim() == 2:
        from primer_fast.functional import shards

        return shards.linear(linear, apply_plain, input, weight, bias, activation)
    if not runs_triton(input):
        return linear_plain(input, weight, bias, activation=activation)
    one_axis = weight.dim() == 1
    if one_axis:
        weight, bias = weight[None], None if bias is None else bias.reshape(1)
    keep = wants_gradient(input, weight, bias)
    y = _call(keep, input, weight, bias, activation, keep)
    return y.squeeze(-1) if one_axis else y


@prepared(3)
def _launch(x, w, b, activation, keep, precision):
    b = b if b is None else b.contiguous()
    return like_rows_of(x, *linear_fwd(as_rows(x), w, b, activation, keep, precision))


@prepared(4)
def _launch_backward(dy, saved, x, w, activation, needed, precision):
    saved = saved if saved is None else as_rows(saved)
    dx, dw, db = linear_bwd(as_rows(dy), saved, as_rows(x), w, activation, needed, precision)
    return *like_rows_of(x, dx), dw, db


@operator("linear")
def _forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, keep: bool
) -> tuple[Tensor, Tensor]:
    """-> y, and what the backward needs beside input and weight"""
    return _launch(input, weight, bias, activation, keep, torch.get_float32_matmul_precision())


@_forward.register_fake
def _(input, weight, bias, activation, keep):
    y = input.new_empty(*input.shape[:-1], weight.shape[0])
    return y, torch.empty_like(y) if keep and keeps_derivative(activation) else None


@operator("linear_backward")
def _gradients(
    dy: Tensor, saved: Tensor | None, input: Tensor, weight: Tensor, activation: str | None, needed: list[bool]
) -> list[Tensor]:
    return _launch_backward(dy, saved, input, weight, activation, tuple(needed), torch.get_float32_matmul_precision())


@_gradients.register_fake
def _(dy, saved, input, weight, activation, needed):
    return [dy.new_empty(shape) for shape in (input.shape, weight.shape, weight.shape[:1])]


def _setup(ctx, inputs, output):
    x, w, b, activation, _ = inputs
    y, saved = output
    ctx.save_for_backward(x, w, b, None if activation is None else y if activation in FROM_OUTPUT else saved)
    ctx.activation = activation


def _backward(ctx, dy):
    x, w, b, saved = ctx.saved_tensors
    needed = ctx.needs_input_grad[:3]
    if differentiates(dy):
        return gradients_of(lambda: linear_plain(x, w, b, activation=ctx.activation), (x, w, b), needed, dy)
    return _gradients(dy, saved, x, w, ctx.activation, needed)


_call, _apply = differentiable(_forward, _setup, _backward, leading=3)


def linear_plain(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None) -> Tensor:
    """The same through torch's own operators."""
    if weight.dim() == 1 and bias is not None:  # which torch's own function takes for some inputs alone
        return apply_plain(torch_F.linear(input, weight) + bias.reshape(()), activation)
    return apply_plain(torch_F.linear(input, weight, bias), activation)


def _check(input, weight, bias):
    tensors = {"input": input, "weight": weight, "bias": bias}
    check_tensors("linear", tensors, optional=("bias",))
    if input.dim() == 0 or weight.dim() not in (1, 2) or weight.shape[-1] != input.shape[-1]:
        raise ValueError(
            "linear: weight must have shape (N, K) or (K,) with K the last axis of input; "
            f"got weight {tuple(weight.shape)} and input {tuple(input.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:-1] and not (weight.dim() == 1 and bias.numel() == 1):
        raise ValueError(
            "linear: bias must have one element per row of weight; "
            f"got bias {tuple(bias.shape)} and weight {tuple(weight.shape)}"
        )
    check_alike("linear", tensors)
