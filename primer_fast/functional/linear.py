"""Differentiable linear layer with bias and activation: checks and reshapes here, math in kernels/linear.py."""

import torch
import torch.nn.functional as torch_F
from torch import Tensor
from torch.autograd.function import once_differentiable

from primer_fast.backend import autocast_dtype, runs_triton
from primer_fast.functional.activation import apply_plain, check_activation
from primer_fast.kernels.linear import linear_bwd_input, linear_bwd_weight, linear_fwd


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, b, activation):  # x (M, K), w (N, K), b (N,) or None
        y, saved = linear_fwd(x, w, b, activation, True, torch.get_float32_matmul_precision())
        ctx.save_for_backward(x, w, saved)
        ctx.activation = activation
        ctx.bias_dtype = None if b is None else b.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # dy (M, N)
        x, w, saved = ctx.saved_tensors
        precision = torch.get_float32_matmul_precision()
        need_x, need_w, need_b, _ = ctx.needs_input_grad
        dx = dw = db = None
        if need_x:
            dx = linear_bwd_input(dy, saved, w, ctx.activation, precision)
        if need_w or need_b:
            columns = x if need_w else x[:, :0]  # the bias gradient alone: a product with no columns
            dw, db = linear_bwd_weight(dy, saved, columns, ctx.activation, ctx.bias_dtype if need_b else None, precision)
        return dx, dw if need_w else None, db, None


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
    dtypes take PyTorch's operators. Sums are in float32; results are deterministic.

    Args:
        activation: None, "relu", "leaky_relu" (slope 0.01), "gelu", "gelu_tanh", "silu", "sigmoid" or "tanh".

    Raises:
        ValueError: the shapes or devices do not match, or ``activation`` is unknown.
        TypeError: an argument is not a tensor, or the dtypes differ.
        RuntimeError: from a second differentiation, which is not supported.

    Source: the layer ``A_i = act(W_i A_{i-1} + b_i)`` of a multilayer perceptron, on rows instead of columns.
    """
    check_activation("linear", activation)
    dtype = autocast_dtype(input)
    if dtype is not None:
        input, weight, bias = (t if t is None or t.dtype == dtype else t.to(dtype) for t in (input, weight, bias))
    _check(input, weight, bias)
    if not runs_triton(input):
        return linear_plain(input, weight, bias, activation=activation)

    one_axis = weight.dim() == 1
    if one_axis:
        weight, bias = weight[None], None if bias is None else bias.reshape(1)
    x = input.reshape(-1, input.shape[-1]) if input.dim() != 2 else input
    if bias is not None and bias.stride(0) != 1:
        bias = bias.contiguous()
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)):
        y = _Linear.apply(x, weight, bias, activation)
    else:
        y = linear_fwd(x, weight, bias, activation, False, torch.get_float32_matmul_precision())[0]
    if one_axis:
        return y.view(input.shape[:-1])
    return y if input.dim() == 2 else y.view(*input.shape[:-1], weight.shape[0])


def linear_plain(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None) -> Tensor:
    """The same through torch's own operators."""
    return apply_plain(torch_F.linear(input, weight, bias), activation)


def _check(input, weight, bias):
    tensors = {"input": input, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"linear: {name} must be a tensor; got {type(t).__name__}")
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
    for name, t in tensors.items():
        if t.device != input.device:
            raise ValueError(f"linear: all tensors must be on one device; got input {input.device}, {name} {t.device}")
        if t.dtype != input.dtype:
            raise TypeError(f"linear: all tensors must have one dtype; got input {input.dtype} and {name} {t.dtype}")
