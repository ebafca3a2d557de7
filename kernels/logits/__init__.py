"""Softmax statistics of the logits of a linear layer and their gradients, for linear_log_prob and linear_cross_entropy.

    z = (x w^T + b) / T        lse = log sum_v e^z_v        log p_v = z_v - lse        H = -sum_v p_v log p_v

A score of row i is (1 - s) log p_t + s mean_v log p_v for its target t and label smoothing s. With upstream gradients
a_i of the scores and c_i of the entropies, the gradient at the products x w^T + b is

    g_v = (a ((1 - s) [v = t] + s / V - p_v) - c p_v (log p_v + H)) / T        dx = g w    dw = g^T x    db = sum_i g

Forward (statistics.py): a program owns a block of rows and a share of the vocabulary. It walks over tiles of
logits, made in registers by the tensor cores, and keeps per row the running maximum, the sum of exponentials relative
to it, the target's logit, and sum e^(z - max) (z - max) or sum z where entropy or smoothing asks for it. A second
kernel combines the shares in a fixed order. The backward needs lse, as the maximum and the logarithm of the sum so that
large logits lose nothing to its rounding, and H: two or three float32 a row.

Backward (gradient.py): g of a chunk of rows and classes is recomputed, tile by tile, into a buffer of at most
CHUNK_BYTES in the input's dtype; two plain products take it from there: dw of those classes complete, dx summed in
float32 over the chunks. Chunks come in a fixed order and nothing is atomic: two runs are bitwise equal.

N rows, D features, V classes; 2 N D V FLOPs are "one product". The forward is one product, the backward three, where
recomputing the logits inside two separate kernels for dx and dw would be four, and both would have to sum
D-wide float32 tiles that no register file holds, in memory. The price is traffic: g written once and read twice, 6 N V
bytes in bfloat16, and dx read and written in float32 for each chunk of classes, 8 N D bytes. At N = 8192, D = 4096,
V = 151936: 40.8 TFLOP in all, 42 ms at cuBLAS's rate, and 7.5 + 2.7 GB, 3 ms of an H100's bandwidth, not all hidden
behind the products. Memory beside the gradients: the buffer, 256 MiB, 4 N D bytes for dx in 16-bit dtypes, and beyond
_CHUNK_ROWS rows a chunk of dw in float32.

The forward can keep the logits, 2 N V bytes in bfloat16: then g is made from them and the backward is two products.
They are rounded before the forward's sums: probabilities made of them must add up to 1. g goes through the buffer here
too, so that the logits serve another backward and memory holds no second tensor of their size.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..device import cdiv, passes
from ..matmul import movable, operand_tile, wrapped
from ..product import Product

LN_2 = tl.constexpr(0.6931471805599453)
LEAST = tl.constexpr(-1e3)  # log2 of an exponential that is 0: in place of -inf, so that 0 log 0 = 0
LOWEST = tl.constexpr(-3.4028234663852886e38)  # the least finite float32


@triton.jit
def products_tile(
    x, w, m, v, M, V, K, strides_x, strides_w,
    PRECISION: tl.constexpr, EVEN_K: tl.constexpr, DESCRIPTORS: tl.constexpr,
    X_K_MAJOR: tl.constexpr, W_K_MAJOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tile (BLOCK_M, BLOCK_V) of x w^T at (m, v)."""
    products = tl.zeros((BLOCK_M, BLOCK_V), dtype=tl.float32)
    # Where the loop might not run at all, Triton 3.6 lets every tensor-core product wait for the one before.
    for k in range(0, tl.maximum(K, 1), BLOCK_K):
        x_tile = operand_tile(x, m, k, M, K, strides_x, BLOCK_M, BLOCK_K, EVEN_K, DESCRIPTORS, X_K_MAJOR)
        w_tile = operand_tile(w, v, k, V, K, strides_w, BLOCK_V, BLOCK_K, EVEN_K, DESCRIPTORS, W_K_MAJOR)
        products = tl.dot(x_tile, w_tile.T, products, input_precision=PRECISION)
    return products


@triton.jit
def any_within(target, v, LENGTH: tl.constexpr):
    """Whether one of the targets is in [v, v + LENGTH)."""
    return tl.max(((target >= v) & (target < v + LENGTH)).to(tl.int32), axis=0) > 0


class Head(NamedTuple):
    """What turns logits into scores."""

    temperature: float = 1.0
    smoothing: float = 0.0
    ignore_index: int | None = None  # the target of rows whose score, entropy and gradients are 0
    sign: float = 1.0  # of the scores: -1.0 makes losses of them


def product_of(M, V, K, itemsize, dot, descriptors, vector):
    return Product(
        M, V, K, itemsize, passes=passes(dot, itemsize), descriptors=descriptors,
        vector=descriptors or (vector and K % 16 == 0),
    )  # fmt: skip


def padded(classes: int) -> int:
    """Classes in a row of logits in memory: every row starts on a 16-byte boundary."""
    return cdiv(classes, 16) * 16


def large(rows: int, classes: int, features: int) -> bool:
    return min(rows, classes) >= 256 and features >= 64


def operands(x, w, gpu, large):
    """Wrapped, and whether descriptors move them. Large ones are copied until they can."""
    x_, w_, _, aligned = wrapped(x, w, None)
    if not gpu.has_descriptors or not (aligned or large) or x.numel() == 0 or w.numel() == 0:
        return x_, w_, False
    return *movable(x_, w_, None)[:2], True


def registers(gpu, settings, itemsize, descriptors):
    """Options of a launch: on Hopper, a limit of registers where only they keep a second program from a processor."""
    held = settings.BLOCK_M * settings.BLOCK_N // (settings.num_warps * 32)
    two = gpu.arch == "sm_90" and descriptors and itemsize == 2 and (held, settings.num_warps) == (64, 8)
    return {"maxnreg": 128} if two else {}


def loaded(x, w, settings, descriptors):
    if not descriptors:
        return x.t, w.t
    return x.descriptor(settings.BLOCK_M, settings.BLOCK_K), w.descriptor(settings.BLOCK_N, settings.BLOCK_K)
