"""Linear layer: matrix product, bias and activation in one kernel, and its two backward products.

    z  = x w^T + b                     y = activation(z)
    g  = dy * activation'(z)
    dx = g w        dw = g^T x         db = sum over rows of g

matmul.py computes every product, as c = a b^T with a (M, K) and b (N, K) in any layout:

    product   a      b      M          N             K
    y         x      w      rows       out features  in features
    dx        g      w^T    rows       in features   out features
    dw        g^T    x^T    out feat.  in features   rows

The forward saves y where activation' follows from it (relu, leaky_relu, sigmoid, tanh), and activation'(z) itself,
not z, elsewhere: then the backward multiplies where it would evaluate erf again for every tile that it meets.

The backward takes one of two ways, whichever an estimate or a measurement puts ahead. Fused: g is made tile by tile on
the way into both products, and db is summed by the programs of dw's first tile column. Prepass: prepass.py
writes g and db once, M N elements more of memory, and both products go as if there were no activation.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .activation import FROM_OUTPUT, keeps_derivative
from .device import Chip, chip_of, dot_precision, passes
from .matmul import matmul
from .prepass import prepass
from .product import LAUNCH_SECONDS, MatmulSettings, Product, estimate, estimated_settings
from .tunable import Variants, bucket_of


def linear_fwd(
    x: Tensor, w: Tensor, b: Tensor | None, activation: str | None, keep: bool, precision: str,
    settings: MatmulSettings | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """x (M, K), w (N, K), b (N,) or None -> y (M, N), what the backward needs beside x and w (M, N) or None.

    keep: whether a backward will come. precision: torch's float32 matmul precision, "highest", "high" or "medium".
    """
    keep_derivative = keep and keeps_derivative(activation)
    y, saved, _ = matmul(x, w, precision, bias=b, activation=activation, keep=keep_derivative, settings=settings)
    return y, (y if keep and activation in FROM_OUTPUT else saved)


def linear_bwd_input(
    dy: Tensor, saved: Tensor | None, w: Tensor, activation: str | None, precision: str,
    settings: MatmulSettings | None = None,
) -> Tensor:  # fmt: skip
    """dy, saved (M, N), w (N, K) -> dx (M, K) in w.dtype."""
    return matmul(dy, w.T, precision, saved=saved, gradient_of=activation, settings=settings)[0]


def linear_bwd_weight(
    dy: Tensor, saved: Tensor | None, x: Tensor, activation: str | None, bias_dtype: torch.dtype | None,
    precision: str, settings: MatmulSettings | None = None, fill: float = 1.0,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """dy, saved (M, N), x (M, K) -> dw (N, K) in x.dtype, db (N,) in bias_dtype, or None where that is None.

    fill: settings slower by up to this factor are taken if they split the sum over rows over the whole chip.
    """
    saved_t = None if saved is None else saved.T
    dw, _, db = matmul(
        dy.T, x.T, precision, saved=saved_t, gradient_of=activation, sums_dtype=bias_dtype, fill=fill, settings=settings
    )
    return dw, db


class BackwardProblem(NamedTuple):
    """What the way of the backward of a layer with an activation depends on."""

    M: int
    N: int
    K: int
    itemsize: int
    passes: int = 1  # see product.Product
    input: bool = True  # x needs a gradient
    weight: bool = True  # so does w
    sums: bool = True  # so does the bias


def _prepass_is_possible(gpu: Chip, p: BackwardProblem) -> bool:
    return min(p.M, p.N, p.K) > 0


def estimated_way(gpu: Chip, p: BackwardProblem) -> str:
    """The way whose kernels take less time by the estimate, in all."""

    def products(fused: bool) -> float:
        dx = Product(p.M, p.K, p.N, p.itemsize, p.passes, gpu.has_descriptors, fused=fused)
        dw = dx._replace(M=p.N, K=p.M)
        return sum(
            estimate(gpu, product, estimated_settings(gpu, product))
            for product, needed in ((dx, p.input), (dw, p.weight))
            if needed
        )

    moved = 3 * p.M * p.N * p.itemsize / (0.9 * gpu.bandwidth * 1e12)
    pass_over = moved + LAUNCH_SECONDS * (2 if p.sums else 1)
    return "prepass" if _prepass_is_possible(gpu, p) and products(False) + pass_over < products(True) else "fused"


backward_choice = Variants(
    "linear_backward",
    lambda p: bucket_of(
        p.M, p.N, p.K, item=p.itemsize, passes=p.passes, input=p.input, weight=p.weight, sums=p.sums
    ),
    {"fused": lambda gpu, p: True, "prepass": _prepass_is_possible},
    estimated_way,
)  # fmt: skip


def linear_bwd(
    dy: Tensor, saved: Tensor | None, x: Tensor, w: Tensor, activation: str | None, needed: Sequence[bool],
    precision: str, fill: float = 1.0,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dy, saved (M, N), x (M, K), w (N, K) -> dx, dw, db, None for each that is not needed: of x, of w, of the bias.

    fill: see linear_bwd_weight.
    """
    need_x, need_w, need_b = needed
    dx = dw = db = None
    if activation is not None and (need_x or need_w):
        (M, N), gpu, itemsize = dy.shape, chip_of(dy), dy.element_size()
        products = passes(dot_precision(gpu, precision), itemsize)
        problem = BackwardProblem(M, N, x.shape[1], itemsize, products, need_x, need_w, need_b)
        if backward_choice(gpu, problem).variant == "prepass":
            dy, db = prepass(dy, saved, activation, w.dtype if need_b else None)
            saved = activation = None
            need_b = False
    if need_x:
        dx = linear_bwd_input(dy, saved, w, activation, precision)
    if need_w or need_b:
        columns = x if need_w else x[:, :0]  # the bias gradient alone: a product with no columns
        dw, sums = linear_bwd_weight(dy, saved, columns, activation, w.dtype if need_b else None, precision, fill=fill)
        db = sums if need_b else db
    return dx, dw if need_w else None, db
