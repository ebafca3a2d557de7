"""The operators primer_fast::mlp and mlp_backward.

``biases`` holds a tensor without elements where a layer has no bias, and what the forward returns after the output
one for each tensor that was not kept: lists of an operator hold tensors alone.
"""

import functools

import torch
from torch import Tensor

from primer_fast.kernels.activation import FROM_OUTPUT
from primer_fast.kernels.mlp import mlp_bwd, mlp_fwd
from primer_fast.kernels.prepared import prepared
from primer_fast.library.register import absent, as_rows, check_kept, like_rows_of, only, operator, present, spread


def forward(x, weights, biases, activation, output_activation, first):
    """x (..., n_0), weights (n_i, n_{i-1}), biases (n_i,) or None -> y (..., n_L), outputs, derivatives."""
    precision = torch.get_float32_matmul_precision()
    return _of(len(weights))[0](x, *weights, *biases, activation, output_activation, first, precision)


def gradients(dy, x, outputs, derivatives, weights, activation, output_activation, needed):
    """dy (..., n_L) -> [dx, dw_1 .., db_1 ..], None for each that is not needed."""
    precision = torch.get_float32_matmul_precision()
    tensors = dy, x, *outputs, *derivatives, *weights
    return _of(len(weights))[1](*tensors, activation, output_activation, tuple(needed), precision)


def known(x, weights, biases, activation, output_activation, first):
    """The plan for such a call of ``forward``, a function of x, the weights and the biases; or None."""
    precision = torch.get_float32_matmul_precision()
    return _of(len(weights))[0].known(x, *weights, *biases, activation, output_activation, first, precision)


@functools.cache
def _of(layers):
    """The prepared launchers, forward and backward, of so many layers."""

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


@operator("mlp")
def mlp(
    input: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    activation: str | None,
    output_activation: str | None,
    first: int,  # layers from the bottom that need no backward
) -> list[Tensor]:
    given = [b if b.numel() else None for b in biases]
    y, outputs, derivatives = forward(input, weights, given, activation, output_activation, first)
    return [y, *(present(t, y) for t in (*outputs, *derivatives))]


@mlp.register_fake
def _(input, weights, biases, activation, output_activation, first):
    rows, last = input.shape[0], len(weights) - 1
    *hidden, y = [input.new_empty(rows, w.shape[0]) for w in weights]
    outputs = [
        h if i + 1 >= first or (i >= first and activation in FROM_OUTPUT) else absent(y) for i, h in enumerate(hidden)
    ]
    derivatives = []
    for i, result in enumerate((*hidden, y)):
        act = output_activation if i == last else activation
        kept = i >= first and act is not None and act not in FROM_OUTPUT
        derivatives.append(torch.empty_like(result) if kept else absent(y))
    return [y, *outputs, absent(y), *derivatives]


@operator("mlp_backward")
def mlp_backward(
    dy: Tensor,
    input: Tensor,
    kept: list[Tensor],  # outputs, derivatives
    weights: list[Tensor],
    activation: str | None,
    output_activation: str | None,
    needed: list[bool],
) -> list[Tensor]:
    layers, tensors = len(weights), [t if t.dim() == 2 else None for t in kept]
    outputs, derivatives = tensors[:layers], tensors[layers:]
    return only(gradients(dy, input, outputs, derivatives, weights, activation, output_activation, needed), needed)


@mlp_backward.register_fake
def _(dy, input, kept, weights, activation, output_activation, needed):
    shapes = [input.shape, *(w.shape for w in weights), *(w.shape[:1] for w in weights)]
    return only([dy.new_empty(s) for s in shapes], needed)


def _setup(ctx, inputs, output):
    x, weights, _, activation, output_activation, first = inputs
    layers, (y, *kept) = len(weights), output
    check_kept("mlp", first < layers)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    if output_activation in FROM_OUTPUT:
        kept[layers - 1] = y
    ctx.save_for_backward(x, *weights, *kept)
    ctx.options = activation, output_activation


def _backward(ctx, grads):
    x, *rest = ctx.saved_tensors
    need_x, need_w, need_b = ctx.needs_input_grad[:3]
    layers, needed = len(need_w), [need_x, *need_w, *need_b]
    found = spread(mlp_backward(grads[0], x, rest[layers:], rest[:layers], *ctx.options, needed), needed)
    return found[0], found[1 : layers + 1], found[layers + 1 :], None, None, None


mlp.register_autograd(_backward, setup_context=_setup)
