"""Differentiable multilayer perceptron: checks and reshapes here, math in kernels/mlp.py."""

__all__ = ["mlp", "mlp_plain"]

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as torch_F
from torch import Tensor

from primer_fast.backend import autocast, autocast_dtype, jit_traces, prepares, runs_triton, sharded
from primer_fast.functional.activation import ACTIVATIONS, apply_plain, check_activation
from primer_fast.functional.checks import check_alike
from primer_fast.functional.operator import (
    absent,
    as_rows,
    check_kept,
    differentiates,
    eager,
    gradients_of,
    like_rows_of,
    needs_operator,
    operator,
    spread,
)
from primer_fast.kernels.activation import FROM_OUTPUT, keeps_derivative
from primer_fast.kernels.launch.prepared import prepared
from primer_fast.kernels.mlp import mlp_bwd, mlp_fwd

_SEQUENCES, _ACTIVATIONS = (list, tuple), (None, *ACTIVATIONS)
_TENSORS = {Tensor, torch.nn.Parameter}
_OPTIONAL = {*_TENSORS, type(None)}


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
    layers = len(weights)
    if autocast_dtype(input) is not None:
        input, *cast = autocast(input, *weights, *biases)
        weights, biases = cast[:layers], cast[layers:]
    if prepares(input):
        first = _first_of_backward(input, weights, biases)
        precision = torch.get_float32_matmul_precision()
        launch = _launchers(layers)[0]
        plan = launch.known(input, *weights, *biases, activation, output_activation, first, precision)
        if plan is not None and first < layers:
            return _applies(layers)(input, *weights, *biases, (activation, output_activation), plan)
        if plan is not None:
            return plan(input, *weights, *biases)[0]
    if not jit_traces():
        _check(input, weights, biases)
    if sharded(input):
        from primer_fast.functional import shards

        return shards.mlp(mlp, input, weights, biases, activation, output_activation)
    if not runs_triton(input):
        return mlp_plain(input, weights, biases, activation=activation, output_activation=output_activation)

    first = _first_of_backward(input, weights, biases)
    if needs_operator(input, *weights, *biases):
        given = [input.new_empty(0) if b is None else b.contiguous() for b in biases]
        y = _forward.registered(as_rows(input), weights, given, activation, output_activation, first)[0]
        return like_rows_of(input, y)[0]

    def run(x, *parameters):
        return _launch(x, *parameters, activation, output_activation, first)

    if first < layers:
        return _applies(layers)(input, *weights, *biases, (activation, output_activation), run)
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


@functools.cache
def _launchers(layers):
    """The prepared launchers, forward and backward, of so many layers.

    forward: x (..., n_0), weights (n_i, n_{i-1}), biases (n_i,) or None -> y (..., n_L), outputs, derivatives.
    backward: dy (..., n_L), x, outputs, derivatives, weights -> dx, dw_1 .., db_1 .., None for each that is not needed.
    """

    def forward(x, *rest):
        weights, biases, options = rest[:layers], rest[layers : 2 * layers], rest[2 * layers :]
        adjacent = [b if b is None else b.contiguous() for b in biases]
        y, *kept = mlp_fwd(as_rows(x), weights, adjacent, *options)
        return *like_rows_of(x, y), *kept

    def backward(dy, x, *rest):
        outputs, derivatives, weights = (rest[i * layers : (i + 1) * layers] for i in range(3))
        dx, *others = mlp_bwd(as_rows(dy), as_rows(x), outputs, derivatives, weights, *rest[3 * layers :])
        return *like_rows_of(x, dx), *others

    return prepared(1 + 2 * layers)(forward), prepared(2 + 3 * layers)(backward)


def _launch(x, *parameters_and_options):
    layers = (len(parameters_and_options) - 3) // 2
    return _launchers(layers)[0](x, *parameters_and_options, torch.get_float32_matmul_precision())


def _launch_backward(dy, x, kept, weights, activation, output_activation, needed):
    options = activation, output_activation, tuple(needed), torch.get_float32_matmul_precision()
    return _launchers(len(weights))[1](dy, x, *kept, *weights, *options)


# The operators take and give lists of tensors alone. A tensor without elements stands for a bias that is None, and for
# each result that was not kept.


@operator("mlp")
def _forward(
    input: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    activation: str | None,
    output_activation: str | None,
    first: int,  # layers from the bottom that need no backward
) -> list[Tensor]:
    given = [b if b.numel() else None for b in biases]
    y, outputs, derivatives = _launch(input, *weights, *given, activation, output_activation, first)
    return [y, *outputs, *derivatives]


@_forward.register_fake
def _(input, weights, biases, activation, output_activation, first):
    rows, last = input.shape[0], len(weights) - 1
    *hidden, y = [input.new_empty(rows, w.shape[0]) for w in weights]
    outputs = [
        h if i + 1 >= first or (i >= first and activation in FROM_OUTPUT) else None for i, h in enumerate(hidden)
    ]
    derivatives = [
        torch.empty_like(t) if i >= first and keeps_derivative(output_activation if i == last else activation) else None
        for i, t in enumerate((*hidden, y))
    ]
    return [y, *outputs, None, *derivatives]


@operator("mlp_backward")
def _gradients(
    dy: Tensor,
    input: Tensor,
    kept: list[Tensor],  # outputs, derivatives
    weights: list[Tensor],
    activation: str | None,
    output_activation: str | None,
    needed: list[bool],
) -> list[Tensor]:
    return _launch_backward(dy, input, _without_stand_ins(kept), weights, activation, output_activation, needed)


@_gradients.register_fake
def _(dy, input, kept, weights, activation, output_activation, needed):
    shapes = [input.shape, *(w.shape for w in weights), *(w.shape[:1] for w in weights)]
    return [dy.new_empty(s) for s in shapes]


def _without_stand_ins(kept):
    return [t if t.dim() == 2 else None for t in kept]


def _keep(ctx, x, weights, biases, activations, kept):
    ctx.save_for_backward(x, *weights, *biases, *kept)
    ctx.layers, ctx.activations = len(weights), activations


def _backward(ctx, dy, needed):
    """-> dx, dw_1 .., db_1 .., None for each that is not needed"""
    (x, *rest), layers, activations = ctx.saved_tensors, ctx.layers, ctx.activations
    weights, biases, kept = rest[:layers], rest[layers : 2 * layers], rest[2 * layers :]
    if differentiates(dy):
        activation, output_activation = activations
        plain = functools.partial(mlp_plain, activation=activation, output_activation=output_activation)
        return gradients_of(lambda: plain(x, weights, biases), (x, *weights, *biases), needed, dy)
    if needs_operator(dy, x, *weights):
        kept = [absent(x) if t is None else t for t in kept]
        return spread(_gradients.registered(dy, x, kept, weights, *activations, needed), needed)
    return _launch_backward(dy, x, kept, weights, activations[0], activations[1], needed)


@functools.cache
def _applies(layers):
    """``apply(x, *weights, *biases, (activation, output_activation), run)`` of so many layers, for eager calls."""
    tensors = 1 + 2 * layers

    def setup(ctx, inputs, output):
        x, parameters, (_, outputs, derivatives) = inputs[0], inputs[1:tensors], output
        _keep(ctx, x, parameters[:layers], parameters[layers:], inputs[tensors:], (*outputs, *derivatives))

    def backward(ctx, dy):
        return _backward(ctx, dy, ctx.needs_input_grad[:tensors])

    return eager("mlp", setup, backward, tensors, tensors)


def _setup_of_operator(ctx, inputs, output):
    x, weights, biases, activation, output_activation, first = inputs
    layers, (y, *kept) = len(weights), output
    check_kept("mlp", first < layers)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    kept = _without_stand_ins(kept)
    if output_activation in FROM_OUTPUT:
        kept[layers - 1] = y
    _keep(ctx, x, weights, [b if b.numel() else None for b in biases], (activation, output_activation), kept)


def _backward_of_operator(ctx, grads):
    need_x, need_w, need_b = ctx.needs_input_grad[:3]
    dx, *found = _backward(ctx, grads[0], [need_x, *need_w, *need_b])
    return dx, found[: ctx.layers], found[ctx.layers :], None, None, None


_forward.registered.register_autograd(_backward_of_operator, setup_context=_setup_of_operator)


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
        check_alike("mlp", {"input": input, f"weights[{i}]": w, f"biases[{i}]": b})
        width, of = w.shape[0], f"layer {i}"
