"""Which way a linear layer's backward takes its activation: fused into both products, or before them by a prepass.

Prepass: prepass.py writes the gradient before the activation once, and both products go as if there were none.
"""

import functools
from typing import NamedTuple

from .device import Chip
from .product import LAUNCH_SECONDS, Product, estimate, estimated_settings
from .tunable import Variants, bucket_of


class Activated(NamedTuple):
    """The backward of a layer with an activation."""

    M: int
    N: int
    K: int
    itemsize: int
    passes: int = 1  # see product.Product
    input: bool = True  # x needs a gradient
    weight: bool = True  # so does w
    sums: bool = True  # so does the bias


def _possible(gpu: Chip, p: Activated) -> bool:
    return min(p.M, p.N, p.K) > 0


@functools.lru_cache(maxsize=4096)
def estimated_way(gpu: Chip, p: Activated) -> str:
    """The way with the smaller sum of estimated times."""

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
    return "prepass" if _possible(gpu, p) and products(False) + pass_over < products(True) else "fused"


backward_choice = Variants(
    "linear_backward",
    lambda p: bucket_of(
        p.M, p.N, p.K, item=p.itemsize, passes=p.passes, input=p.input, weight=p.weight, sums=p.sums
    ),
    {"fused": lambda gpu, p: True, "prepass": _possible},
    estimated_way,
)  # fmt: skip
