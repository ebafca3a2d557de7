"""Multilayer perceptron: linear layers with an activation between them, and their backward without a pass for it.

    h_0 = x                            rows are samples: x (M, n_0)
    z_i = h_{i-1} w_i^T + b_i          h_i = act(z_i)              i = 1..L, w_i (n_i, n_{i-1}), b_i (n_i)
    y   = output_act(z_L)

    dz_L     = dy * output_act'(z_L)
    dz_{i-1} = (dz_i w_i) * act'(z_{i-1})          dx = dz_1 w_1
    dw_i     = dz_i^T h_{i-1}                      db_i = sum over rows of dz_i

matmul.py computes every product, as c = a b^T with a (M, K) and b (N, K) in any layout:

    product    a        b            M       N         K           on the result
    h_i        h_{i-1}  w_i          rows    n_i       n_{i-1}     bias, act
    dz_{i-1}   dz_i     w_i^T        rows    n_{i-1}   n_i         * act'(z_{i-1})
    dw_i       dz_i^T   h_{i-1}^T    n_i     n_{i-1}   rows        and db_i, the sums of a

The derivative multiplies a result that is in registers already: no pass over memory makes dz, and both products that
read it take their operands as they lie. Only an output activation has no product above it; prepass.py makes
dz_L then, or linear.py does where the last layer is the only one with a backward.

What the forward keeps: h_i of each hidden layer, and act'(z_i) where it does not follow from h_i: the same as layers
one by one. The backward holds two dz at a time.

Sources: the primer's multilayer perceptron, A_i = act(W_i A_{i-1} + b_i) on columns; Vaswani et al. 2017
(arXiv:1706.03762), 3.3, max(0, x W_1 + b_1) W_2 + b_2 on every position.
"""

from collections.abc import Sequence

from torch import Tensor

from .activation import FROM_OUTPUT
from .linear import linear_bwd, linear_bwd_input, linear_bwd_weight, linear_fwd
from .matmul import matmul
from .prepass import prepass


def mlp_fwd(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], activation: str | None,
    output_activation: str | None, first: int, precision: str,
) -> tuple[Tensor, list[Tensor | None], list[Tensor | None]]:  # fmt: skip
    """x (M, n_0), weights (n_i, n_{i-1}), biases (n_i,) or None -> y (M, n_L), outputs, derivatives.

    first: how many layers from the bottom need no backward; all of them where none will come.
    outputs: of each layer what the backward needs of it, as the next one's input or for the derivative, or None.
    derivatives: of each layer act'(z_i) where it does not follow from the output, or None.
    precision: torch's float32 matmul precision, "highest", "high" or "medium".
    """
    last = len(weights) - 1
    outputs, derivatives = [], []
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        act = output_activation if i == last else activation
        x, kept = linear_fwd(x, w, b, act, i >= first, precision)
        as_input, as_output = i < last and i + 1 >= first, i >= first and act in FROM_OUTPUT
        outputs.append(x if as_input or as_output else None)
        derivatives.append(None if act in FROM_OUTPUT else kept)
    return x, outputs, derivatives


def mlp_bwd(
    dy: Tensor, x: Tensor, outputs: Sequence[Tensor | None], derivatives: Sequence[Tensor | None],
    weights: Sequence[Tensor], activation: str | None, output_activation: str | None, needed: Sequence[bool],
    precision: str,
) -> list[Tensor | None]:  # fmt: skip
    """dy (M, n_L), what the forward took and kept -> [dx, dw_1 .. dw_L, db_1 .. db_L], None where not needed.

    needed: a bool for each of these results.
    """
    last, inputs = len(weights) - 1, [x, *outputs[:-1]]
    need_x, need_w, need_b = needed[0], needed[1 : last + 2], needed[last + 2 :]
    first = 0 if need_x else next(i for i in range(last + 1) if need_w[i] or need_b[i])
    dws, dbs, act = [None] * (last + 1), [None] * (last + 1), output_activation

    def saved(i, act):
        return outputs[i] if act in FROM_OUTPUT else derivatives[i]

    if first == last:
        layer = need_x, need_w[last], need_b[last]
        kept = None if act is None else saved(last, act)
        dx, dws[last], dbs[last] = linear_bwd(dy, kept, inputs[last], weights[last], act, layer, precision)
        return [dx, *dws, *dbs]
    dz, sums = dy, None
    if act is not None and dy.numel():
        dz, sums = prepass(dy, saved(last, act), act, weights[last].dtype if need_b[last] else None)
    for i in range(last, first - 1, -1):
        w, sum_here = weights[i], need_b[i] and sums is None
        if need_w[i] or sum_here:
            columns = inputs[i] if need_w[i] else inputs[i][:, :0]  # the bias gradient alone: a product with no columns
            dw, db = linear_bwd_weight(dz, None, columns, None, w.dtype if sum_here else None, precision)
            dws[i], dbs[i] = dw if need_w[i] else None, db
        if sums is not None:
            dbs[i], sums = sums, None
        if i > first:
            slope = None if activation is None else saved(i - 1, activation)
            dz = matmul(dz, w.T, precision, slope=slope, slope_of=activation)[0]
    dx = linear_bwd_input(dz, None, weights[0], None, precision) if need_x else None
    return [dx, *dws, *dbs]
