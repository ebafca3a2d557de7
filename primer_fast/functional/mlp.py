"""Differentiable multilayer perceptron: checks and reshapes here, math in kernels/mlp.py."""

__all__ = ["mlp", "mlp_plain"]

from collections.abc import Sequence

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
)
from primer_fast.functional.activation import ACTIVATIONS, apply_plain, check_activation
from primer_fast.library.register import as_rows, like_rows_of


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, run, activation, output_activation, layers, x, *parameters
    ):  # x (..., n_0), weights, biases (n_i,) or None
        y, outputs, derivatives = run(x, *parameters)
        ctx.save_for_backward(x, *parameters, *outputs, *derivatives)
        ctx.activations, ctx.layers = (activation, output_activation), layers
        return y

    @staticmethod
    def backward(ctx, dy):  # dy (..., n_L)
        x, *saved = ctx.saved_tensors
        needed, (activation, output_activation) = ctx.needs_input_grad[4:], ctx.activations
        weights, biases, outputs, derivatives = (saved[i * ctx.layers : (i + 1) * ctx.layers] for i in range(4))
        if differentiates(dy):
            grads = _differentiable_grads(x, weights, biases, ctx.activations, dy, needed)
        else:
            grads = library.mlp.gradients(dy, x, outputs, derivatives, weights, activation, output_activation, needed)
        return None, None, None, None, *grads


_apply = apply_of(_MLP)
_SEQUENCES, _ACTIVATIONS = (list, tuple), (None, *ACTIVATIONS)
_TENSORS = {Tensor, torch.nn.Parameter}
_OPTIONAL = {*_TENSORS, type(None)}


def _differentiable_grads(x, weights, biases, activations, dy, needed):
    activation, output_activation = activations

    def plain():
        return mlp_plain(x, weights, biases, activation=activation, output_activation=output_activation)

    return gradients_of(plain, (x, *weights, *biases), needed, dy)


def mlp(
    input: Tensor,  # (..., n_0)
    weights: Sequence[Tensor],  # L of them, (n_i, n_{i-1})
    biases: Sequence[Tensor | None] | None = None,  # L of them, (n_i,)
    *,
    activation: str | None = "gelu",
    output_activation: str | None = None,
) -> Tensor:  # (..., n_L)
    """Linear layers with ``activation`` between them and ``output_activation`` after the last.

    The backward multiplies by the derivative in the product that makes the gradient: no pass over memory of its own.

    float32, float16 and bfloat16 on a GPU run in Triton; float32 products follow
    ``torch.get_float32_matmul_precision()``. Other devices and dtypes, and gradients that are themselves
    differentiated, take PyTorch's operators. Sums are in float32; two runs are bitwise equal.

    Memory: for the backward each hidden layer's output is kept and, for gelu, gelu_tanh and silu, the derivative of the
    same size, as calls of ``linear`` one by one keep; nothing of layers below which nothing needs a gradient. The
    backward holds two gradients of hidden layers at a time.

    Args:
        activation, output_activation: None or one of ``primer_fast.functional.activation.ACTIVATIONS``.

    Raises:
        ValueError: there is no weight, lengths, shapes or devices do not match, or an activation is unknown.
        TypeError: an argument is not a tensor or a sequence of tensors, or the dtypes differ.

    Source: the primer's multilayer perceptron ``A_i = act(W_i A_{i-1} + b_i)``, on rows instead of columns; with two
    layers that of the transformer, Vaswani et al. 2017 (arXiv:1706.03762), 3.3.
    """
    if activation not in _ACTIVATIONS or output_activation not in _ACTIVATIONS:
        check_activation("mlp", activation)
        check_activation("mlp", output_activation)
    weights, biases = _lists(input, weights, biases)
    dtype = autocast_dtype(input)
    if dtype is not None:
        input, *cast = autocast_to(dtype, input, *weights, *biases)
        weights, biases = cast[: len(weights)], cast[len(weights) :]
    layers = len(weights)
    if prepares(input):
        first = _first_of_backward(input, weights, biases)
        plan = library.mlp.known(input, weights, biases, activation, output_activation, first)
        if plan is not None and first < layers:
            return _apply(plan, activation, output_activation, layers, input, *weights, *biases)
        if plan is not None:
            return plan(input, *weights, *biases)[0]
    if not jit_traces():
        _check(input, weights, biases)
    if type(input) not in EAGER and sharded(input):
        from primer_fast.functional import shards

        return shards.mlp(mlp, input, weights, biases, activation, output_activation)
    if not runs_triton(input):
        return mlp_plain(input, weights, biases, activation=activation, output_activation=output_activation)

    first = _first_of_backward(input, weights, biases)
    if needs_operator(input, *weights, *biases):
        given = [input.new_empty(0) if b is None else b.contiguous() for b in biases]
        y = library.mlp.mlp(as_rows(input), weights, given, activation, output_activation, first)[0]
        return like_rows_of(input, y)[0]

    def run(x, *parameters):
        return library.mlp.forward(
            x, parameters[:layers], parameters[layers:], activation, output_activation, first
        )  # fmt: skip

    if first < layers:
        return _apply(run, activation, output_activation, layers, input, *weights, *biases)
    return run(input, *weights, *biases)[0]


def mlp_plain(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    activation: str | None = "gelu",
    output_activation: str | None = None,
) -> Tensor:
    """The same through torch's own operators."""
    last = len(weights) - 1
    for i, weight in enumerate(weights):
        bias = None if biases is None else biases[i]
        input = apply_plain(torch_F.linear(input, weight, bias), output_activation if i == last else activation)
    return input


def _first_of_backward(x, weights, biases):
    """How many layers from the bottom need no backward: all, where no gradient will be asked for."""
    if not torch.is_grad_enabled():
        return len(weights)
    if x.requires_grad:
        return 0
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        if w.requires_grad or (b is not None and b.requires_grad):
            return i
    return len(weights)


def _lists(input, weights, biases):
    """The weights and as many biases or Nones."""
    if type(weights) in _SEQUENCES and type(biases) in _SEQUENCES and 0 < len(weights) == len(biases):
        for t in (input, *weights):
            if type(t) not in _TENSORS:
                break
        else:  # most calls: on a small input the rest would take longer than the op
            if _OPTIONAL.issuperset(map(type, biases)):
                return weights, biases
    if not isinstance(input, Tensor):
        raise TypeError(f"mlp: input must be a tensor; got {type(input).__name__}")
    for name, given in (("weights", weights), ("biases", biases)):
        if given is None and name == "biases":
            continue
        if isinstance(given, Tensor | str) or not hasattr(given, "__iter__"):
            raise TypeError(f"mlp: {name} must be a sequence of tensors; got {type(given).__name__}")
    weights = list(weights)
    biases = [None] * len(weights) if biases is None else list(biases)
    if not weights or len(biases) != len(weights):
        raise ValueError(
            "mlp: weights must hold a tensor for each layer, one at least, and biases as many; "
            f"got {len(weights)} weights and {len(biases)} biases"
        )
    for name, given in (("weights", weights), ("biases", biases)):
        for i, t in enumerate(given):
            if not isinstance(t, Tensor) and (t is not None or name != "biases"):
                raise TypeError(f"mlp: {name} must hold tensors; got {type(t).__name__} at {i}")
    return weights, biases


def _fit(input, weights, biases) -> bool:
    """All of ``_check`` at once: on a small input its loop would take longer than the op."""
    dtype, device, shape = input.dtype, input.device, input.shape
    if not shape:
        return False
    width = shape[-1]
    for w, b in zip(weights, biases):  # noqa: B905 (as many: see _lists)
        shape = w.shape
        if len(shape) != 2 or shape[1] != width or w.dtype is not dtype or w.device != device:
            return False
        width = shape[0]
        if b is not None and (b.shape != (width,) or b.dtype is not dtype or b.device != device):
            return False
    return True


def _check(input, weights, biases):
    if _fit(input, weights, biases):
        return
    if input.dim() == 0:
        raise ValueError(f"mlp: input must have one axis at least; got {tuple(input.shape)}")
    width, of = input.shape[-1], "input"
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        if w.dim() != 2 or w.shape[1] != width:
            raise ValueError(
                f"mlp: weights[{i}] must have shape (n, {width}), as {of} has {width} features; got {tuple(w.shape)}"
            )
        if b is not None and b.shape != w.shape[:1]:
            raise ValueError(
                f"mlp: biases[{i}] must have one element per row of weights[{i}]; "
                f"got {tuple(b.shape)} and {tuple(w.shape)}"
            )
        for name, t in ((f"weights[{i}]", w), (f"biases[{i}]", b)):
            if t is None:
                continue
            if t.device != input.device:
                raise ValueError(f"mlp: all tensors must be on one device; got input {input.device}, {name} {t.device}")
            if t.dtype != input.dtype:
                raise TypeError(f"mlp: all tensors must have one dtype; got input {input.dtype} and {name} {t.dtype}")
        width, of = w.shape[0], f"layer {i}"
