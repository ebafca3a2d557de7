"""Differentiable linear layer with bias and activation: checks and reshapes here, math in kernels/linear.py."""

__all__ = ["linear", "linear_plain"]

import torch
import torch.nn.functional as torch_F
from torch import Tensor

from primer_fast import library
from primer_fast.backend import (
    EAGER,
    apply_of,
    autocast_dtype,
    autocast_to,
    differentiates,
    gradients_of,
    jit_traces,
    needs_operator,
    prepares,
    runs_triton,
    sharded,
    wants_gradient,
)
from primer_fast.functional.activation import apply_plain, check_activation
from primer_fast.library.register import as_rows, like_rows_of


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, x, w, b, activation):  # x (..., K), w (N, K), b (N,) or None
        y, saved = run(x, w, b)
        ctx.save_for_backward(x, w, b, saved)
        ctx.activation = activation
        return y

    @staticmethod
    def backward(ctx, dy):  # dy (..., N)
        x, w, b, saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:4]
        if differentiates(dy):
            return None, *_differentiable_grads(x, w, b, ctx.activation, dy, needed), None
        return None, *library.linear.gradients(dy, saved, x, w, ctx.activation, needed), None


_apply = apply_of(_Linear)


def _differentiable_grads(x, w, b, activation, dy, needed):
    return gradients_of(lambda: linear_plain(x, w, b, activation=activation), (x, w, b), needed, dy)


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
    if prepares(input):
        if (dtype := autocast_dtype(input)) is not None:
            input, weight, bias = autocast_to(dtype, input, weight, bias)
        keep = wants_gradient(input, weight, bias)
        plan = library.linear.known(input, weight, bias, activation, keep, torch.get_float32_matmul_precision())
        if plan is not None:
            return _apply(plan, input, weight, bias, activation) if keep else plan(input, weight, bias)[0]
    check_activation("linear", activation)
    if jit_traces():
        return linear_plain(input, weight, bias, activation=activation)
    for name, t in (("input", input), ("weight", weight), ("bias", bias)):
        if not isinstance(t, Tensor) and (t is not None or name != "bias"):
            raise TypeError(f"linear: {name} must be a tensor; got {type(t).__name__}")
    dtype = autocast_dtype(input)
    if dtype is not None:
        input, weight, bias = autocast_to(dtype, input, weight, bias)
    _check(input, weight, bias)
    if type(input) not in EAGER and sharded(input) and weight.dim() == 2:
        from primer_fast.functional import shards

        return shards.linear(linear, apply_plain, input, weight, bias, activation)
    if not runs_triton(input):
        return linear_plain(input, weight, bias, activation=activation)

    one_axis = weight.dim() == 1
    if one_axis:
        weight, bias = weight[None], None if bias is None else bias.reshape(1)
    keep = wants_gradient(input, weight, bias)
    if needs_operator(input, weight, bias):
        y = library.linear.linear(as_rows(input), weight, bias, activation, keep)[0]
        (y,) = like_rows_of(input, y)
    elif keep:
        y = _apply(lambda x, w, b: library.linear.forward(x, w, b, activation, True), input, weight, bias, activation)
    else:
        y = library.linear.forward(input, weight, bias, activation, False)[0]
    return y.squeeze(-1) if one_axis else y


def linear_plain(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None) -> Tensor:
    """The same through torch's own operators."""
    if weight.dim() == 1 and bias is not None:  # which torch's own function takes for some inputs alone
        return apply_plain(torch_F.linear(input, weight) + bias.reshape(()), activation)
    return apply_plain(torch_F.linear(input, weight, bias), activation)


def _check(input, weight, bias):
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
    for name, t in (("weight", weight), ("bias", bias)):
        if t is None:
            continue
        if t.device != input.device:
            raise ValueError(f"linear: all tensors must be on one device; got input {input.device}, {name} {t.device}")
        if t.dtype != input.dtype:
            raise TypeError(f"linear: all tensors must have one dtype; got input {input.dtype} and {name} {t.dtype}")
