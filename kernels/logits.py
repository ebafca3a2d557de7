"""Softmax statistics of the logits of a linear layer and their gradients, for linear_log_prob and linear_cross_entropy.

    z = (x w^T + b) / T        lse = log sum_v e^z_v        log p_v = z_v - lse        H = -sum_v p_v log p_v

A score of row i is (1 - s) log p_t + s mean_v log p_v for its target t and label smoothing s. With upstream gradients
a_i of the scores and c_i of the entropies, the gradient at the products x w^T + b is

    g_v = (a ((1 - s) [v = t] + s / V - p_v) - c p_v (log p_v + H)) / T        dx = g w    dw = g^T x    db = sum_i g

Forward: a program owns a block of rows and a share of the vocabulary. It walks over tiles of logits, made in registers
by the tensor cores, and keeps per row the running maximum, the sum of exponentials relative to it, the target's logit,
and sum e^(z - max) (z - max) or sum z where entropy or smoothing asks for it. A second kernel combines the shares in a
fixed order. The backward needs lse, as the maximum and the logarithm of the sum so that large logits lose nothing to
its rounding, and H: two or three float32 a row.

Backward: g of a chunk of rows and classes is recomputed, tile by tile, into a buffer of at most CHUNK_BYTES in the
input's dtype; two plain products take it from there: dw of those classes complete, dx summed in float32 over the
chunks. Chunks come in a fixed order and nothing is atomic: two runs are bitwise equal.

N rows, D features, V classes; 2 N D V FLOPs are "one product". The forward is one product, the backward three, where
recomputing the logits inside two separate kernels for dx and dw would be four, and both would have to sum
D-wide float32 tiles that no register file holds, in memory. The price is traffic: g written once and read twice, 6 N V
bytes in bfloat16, and dx read and written in float32 for each chunk of classes, 8 N D bytes. At N = 8192, D = 4096,
V = 151936: 40.8 TFLOP in all, 42 ms at cuBLAS's rate, and 7.5 + 5.1 GB, 3.8 ms of an H100's bandwidth, not all hidden
behind the products. Memory beside the gradients: the buffer, 4 N D bytes for dx in 16-bit dtypes, and beyond
_CHUNK_ROWS rows a chunk of dw in float32.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .descriptor import tensor_descriptor
from .entry import entry
from .launch import (
    Chip,
    MatmulSettings,
    Product,
    cdiv,
    chip,
    dot_precision,
    estimated_settings,
    on_device_of,
    product_choice,
    tile_fits,
)  # fmt: skip
from .linear import Operand, matmul, movable, operand_tile, wrapped
from .tile import grouped_tile

CHUNK_BYTES = 2**27  # of the buffer for gradients at the logits
_CHUNK_ROWS = 16384
_LOG2_E = 1.4426950408889634
_LN_2 = tl.constexpr(0.6931471805599453)
_LEAST = tl.constexpr(-1e3)  # log2 of an exponential that is 0: in place of -inf, so that 0 log 0 = 0
_COMBINED = 128  # rows of a program that combines shares


@triton.jit
def _products_tile(
    x, w, m, v, M, V, K, stride_xm, stride_xk, stride_wv, stride_wk,
    PRECISION: tl.constexpr, EVEN_K: tl.constexpr, DESCRIPTORS: tl.constexpr,
    X_K_MAJOR: tl.constexpr, W_K_MAJOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tile (BLOCK_M, BLOCK_V) of x w^T at (m, v)."""
    products = tl.zeros((BLOCK_M, BLOCK_V), dtype=tl.float32)
    for k in range(0, tl.maximum(K, 1), BLOCK_K):
        x_tile = operand_tile(x, m, k, M, K, stride_xm, stride_xk, BLOCK_M, BLOCK_K, EVEN_K, DESCRIPTORS, X_K_MAJOR)
        w_tile = operand_tile(w, v, k, V, K, stride_wv, stride_wk, BLOCK_V, BLOCK_K, EVEN_K, DESCRIPTORS, W_K_MAJOR)
        products = tl.dot(x_tile, w_tile.T, products, input_precision=PRECISION)
    return products


@triton.jit
def _any_within(target, v, LENGTH: tl.constexpr):
    """Whether one of the targets is in [v, v + LENGTH)."""
    return tl.max(((target >= v) & (target < v + LENGTH)).to(tl.int32), axis=0) > 0


@triton.jit
def _rescale(extra, total, peak, base):
    """sum e (z - peak) with e = 2^(z - peak) and total = sum e -> the same sum relative to base."""
    moved = tl.where(peak == float("-inf"), 0.0, (peak - base) * total)
    return tl.exp2(peak - base) * (extra + moved)


@entry
def _statistics_kernel(
    part_ptr,  # (SPLITS, 3 or 4, M) float32: maximum, sum of exponentials, target's logit, extra: see above
    x, w, bias_ptr, target_ptr,  # x (M, K), w (V, K): pointers or descriptors
    stride_xm, stride_xk, stride_wv, stride_wk,  # in elements
    M, V, K, tiles_per_split, scale,
    EXTRA: tl.constexpr,  # "entropy", "sum" or None
    PRECISION: tl.constexpr, EVEN_K: tl.constexpr, DESCRIPTORS: tl.constexpr,
    X_K_MAJOR: tl.constexpr, W_K_MAJOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Program (row block, share): the statistics of the share's classes."""
    tile_m, split = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), SPLITS, GROUP_M)
    m = tile_m * BLOCK_M
    offs_m = m + tl.arange(0, BLOCK_M)
    target = tl.load(target_ptr + offs_m, mask=offs_m < M, other=-1)
    target = tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)

    peak = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    chosen = tl.zeros((BLOCK_M,), dtype=tl.float32)
    extra = tl.zeros((BLOCK_M,), dtype=tl.float32)
    first = split * tiles_per_split
    for tile in range(first, tl.minimum(first + tiles_per_split, tl.cdiv(V, BLOCK_V))):
        v = tile * BLOCK_V
        z = _products_tile(
            x, w, m, v, M, V, K, stride_xm, stride_xk, stride_wv, stride_wk,
            PRECISION, EVEN_K, DESCRIPTORS, X_K_MAJOR, W_K_MAJOR, BLOCK_M, BLOCK_V, BLOCK_K,
        )  # fmt: skip
        offs_v = v + tl.arange(0, BLOCK_V)
        if bias_ptr is not None:
            z += tl.load(bias_ptr + offs_v, mask=offs_v < V, other=0.0).to(tl.float32)[None, :]
        if EXTRA == "sum":  # 0 outside the vocabulary
            extra += tl.sum(z, axis=1)
        if v + BLOCK_V > V:
            z = tl.where((offs_v < V)[None, :], z, float("-inf"))
        if _any_within(target, v, BLOCK_V):
            chosen += tl.sum(tl.where(offs_v[None, :] == target[:, None], z, 0.0), axis=1)
        top = tl.maximum(peak, tl.max(z, axis=1) * scale)  # drops NaN, which the sum of exponentials keeps
        base = tl.where(top == float("-inf"), 0.0, top)
        log_e = z * scale - base[:, None]  # one multiply-add, and so no rounding at the size of z
        e = tl.exp2(log_e)
        if EXTRA == "entropy":
            extra = _rescale(extra, total, peak, base) + tl.sum(e * tl.maximum(log_e, _LEAST), axis=1)
        total = total * tl.exp2(peak - base) + tl.sum(e, axis=1)
        peak = top

    rows = offs_m < M
    stats = 3 if EXTRA is None else 4
    part_ptr += (split * stats).to(tl.int64) * M + offs_m
    tl.store(part_ptr, peak, mask=rows)
    tl.store(part_ptr + M, total, mask=rows)
    tl.store(part_ptr + 2 * M, chosen, mask=rows)
    if EXTRA is not None:
        tl.store(part_ptr + 3 * M, extra, mask=rows)


@entry
def _combine_kernel(
    score_ptr, lse_ptr, entropy_ptr,  # (M,), (2, M), (M,) float32; lse: maximum, log2 of the sum relative to it
    part_ptr, target_ptr, M, V, splits, scale, ignore_index, smoothing, sign,  # ignore_index: None where no row is ignored
    EXTRA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the shares of BLOCK rows, combined in order. A target outside the vocabulary gives NaN."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows = offs < M
    peak = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    chosen = tl.zeros((BLOCK,), dtype=tl.float32)
    extra = tl.zeros((BLOCK,), dtype=tl.float32)
    part_ptr += offs
    for _ in range(splits):
        peak_part = tl.load(part_ptr, mask=rows, other=0.0)
        total_part = tl.load(part_ptr + M, mask=rows, other=1.0)
        chosen += tl.load(part_ptr + 2 * M, mask=rows, other=0.0)
        top = tl.maximum(peak, peak_part)
        base = tl.where(top == float("-inf"), 0.0, top)
        if EXTRA is not None:
            extra_part = tl.load(part_ptr + 3 * M, mask=rows, other=0.0)
            if EXTRA == "entropy":
                extra = _rescale(extra, total, peak, base) + _rescale(extra_part, total_part, peak_part, base)
            else:
                extra += extra_part
        total = total * tl.exp2(peak - base) + total_part * tl.exp2(peak_part - base)
        peak = top
        part_ptr += 3 * M if EXTRA is None else 4 * M

    log_total = tl.log2(total)
    score = chosen * scale - peak - log_total
    if EXTRA == "sum":
        score = (1.0 - smoothing) * score + smoothing * (extra / V * scale - peak - log_total)
    score *= _LN_2 * sign
    target = tl.load(target_ptr + offs, mask=rows, other=0)
    known = (target >= 0) & (target < V)
    if ignore_index is not None:
        ignored = target == ignore_index
        score = tl.where(ignored, 0.0, score)
        known = known | ignored
    tl.store(score_ptr + offs, tl.where(known, score, float("nan")), mask=rows)
    tl.store(lse_ptr + offs, peak, mask=rows)
    tl.store(lse_ptr + M + offs, tl.where(known, log_total, float("nan")), mask=rows)
    if EXTRA == "entropy":
        tl.store(entropy_ptr + offs, (log_total - extra / total) * _LN_2, mask=rows)


@triton.jit
def _row_terms(
    offs_m, M, target_ptr, peak_ptr, log_total_ptr, score_grad_ptr, entropy_grad_ptr, entropy_ptr,
    first_class, V, share, smooth, inverse_temperature,
):  # fmt: skip
    """What the gradient at a row's logits is made of: with log_e = log2 e^(z - max) it is

    -e (weight + slope log_e) + uniform, and at_target more at the class ``target``, or -1 where that is not among the V.
    """
    rows = offs_m < M
    target = tl.load(target_ptr + offs_m, mask=rows, other=-1) - first_class
    target = tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)
    peak = tl.load(peak_ptr + offs_m, mask=rows, other=0.0)
    log_total = tl.load(log_total_ptr + offs_m, mask=rows, other=0.0)
    score_grad = tl.load(score_grad_ptr + offs_m, mask=rows, other=0.0) * inverse_temperature
    weight, slope = score_grad, score_grad
    if entropy_ptr is not None:
        entropy_grad = tl.load(entropy_grad_ptr + offs_m, mask=rows, other=0.0) * inverse_temperature
        entropy = tl.load(entropy_ptr + offs_m, mask=rows, other=0.0)
        weight += entropy_grad * (entropy - log_total * _LN_2)
        slope = entropy_grad * _LN_2
    of_total = tl.exp2(-log_total)
    return target, peak, weight * of_total, slope * of_total, score_grad * smooth, score_grad * share


@triton.jit
def _gradient_at(z, target, peak, weight, slope, uniform, at_target, offs_v, scale, has_target, ENTROPY: tl.constexpr):
    """Logits before the scale -> gradient at them, from the terms of their rows."""
    log_e = z * scale - peak[:, None]  # one multiply-add, as in the forward
    factor = -weight[:, None]
    if ENTROPY:
        factor -= slope[:, None] * tl.maximum(log_e, _LEAST)
    g = tl.exp2(log_e) * factor + uniform[:, None]
    if has_target:
        g += tl.where(offs_v[None, :] == target[:, None], at_target[:, None], 0.0)
    return g


@triton.jit
def _store_gradient(
    products, out, bias_ptr, target, peak, weight, slope, uniform, at_target, has_target, m, v, M, V, stride_out, scale,
    ENTROPY: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, SUBTILES: tl.constexpr,
):  # fmt: skip
    """Products -> gradient at them, stored in SUBTILES column parts so that fewer values live at once."""
    if SUBTILES > 1:
        HALF: tl.constexpr = BLOCK_V // 2
        left, right = products.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
        _store_gradient(
            left, out, bias_ptr, target, peak, weight, slope, uniform, at_target, has_target, m, v, M, V,
            stride_out, scale, ENTROPY, DESCRIPTORS, BLOCK_M, HALF, SUBTILES // 2,
        )  # fmt: skip
        _store_gradient(
            right, out, bias_ptr, target, peak, weight, slope, uniform, at_target, has_target, m, v + HALF, M, V,
            stride_out, scale, ENTROPY, DESCRIPTORS, BLOCK_M, HALF, SUBTILES // 2,
        )  # fmt: skip
    else:
        offs_v = v + tl.arange(0, BLOCK_V)
        if bias_ptr is not None:
            products += tl.load(bias_ptr + offs_v, mask=offs_v < V, other=float("-inf")).to(tl.float32)[None, :]
        g = _gradient_at(
            products, target, peak, weight, slope, uniform, at_target, offs_v, scale, has_target, ENTROPY
        )  # fmt: skip
        if DESCRIPTORS:
            out.store([m, v], g.to(out.dtype))
        else:
            offs_m = m + tl.arange(0, BLOCK_M)
            inside = (offs_m[:, None] < M) & (offs_v[None, :] < V)
            offsets = offs_m.to(tl.int64)[:, None] * stride_out + offs_v[None, :]
            tl.store(out + offsets, g.to(out.dtype.element_ty), mask=inside)


@entry
def _gradient_kernel(
    out,  # (M, V), rows stride_out apart: pointer or descriptor
    x, w, bias_ptr,
    target_ptr, peak_ptr, log_total_ptr, score_grad_ptr, entropy_grad_ptr, entropy_ptr,  # (M,)
    stride_out, stride_xm, stride_xk, stride_wv, stride_wk,  # in elements
    M, V, K, first_class, scale, share, smooth, inverse_temperature,  # V classes from first_class on
    PRECISION: tl.constexpr, EVEN_K: tl.constexpr, DESCRIPTORS: tl.constexpr, DESCRIPTOR_OUT: tl.constexpr,
    X_K_MAJOR: tl.constexpr, W_K_MAJOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, SUBTILES: tl.constexpr,
):  # fmt: skip
    """One program: the gradient at one tile of x w^T + b."""
    tile_m, tile_v = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(V, BLOCK_V), GROUP_M)
    m, v = tile_m * BLOCK_M, tile_v * BLOCK_V
    products = _products_tile(
        x, w, m, v, M, V, K, stride_xm, stride_xk, stride_wv, stride_wk,
        PRECISION, EVEN_K, DESCRIPTORS, X_K_MAJOR, W_K_MAJOR, BLOCK_M, BLOCK_V, BLOCK_K,
    )  # fmt: skip
    target, peak, weight, slope, uniform, at_target = _row_terms(
        m + tl.arange(0, BLOCK_M), M, target_ptr, peak_ptr, log_total_ptr, score_grad_ptr, entropy_grad_ptr,
        entropy_ptr, first_class, V, share, smooth, inverse_temperature,
    )  # fmt: skip
    _store_gradient(
        products, out, bias_ptr, target, peak, weight, slope, uniform, at_target, _any_within(target, v, BLOCK_V),
        m, v, M, V, stride_out, scale, entropy_ptr is not None, DESCRIPTOR_OUT, BLOCK_M, BLOCK_V, SUBTILES,
    )  # fmt: skip


class Head(NamedTuple):
    """What turns logits into scores."""

    temperature: float = 1.0
    smoothing: float = 0.0
    ignore_index: int | None = None  # the target of rows whose score is 0
    sign: float = 1.0  # of the scores: -1.0 makes losses of them


def _product(M, V, K, itemsize, dot, descriptors, vector):
    return Product(
        M, V, K, itemsize, passes=3 if dot == "tf32x3" and itemsize == 4 else 1, descriptors=descriptors,
        vector=descriptors or (vector and K % 16 == 0),
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def share_count(gpu: Chip, s: MatmulSettings, rows: int, classes: int) -> int:
    """Shares of the vocabulary that end together: of those within 2 % of the fewest tiles in turn, the nearest to 16.

    A wave of 8 row blocks by 16 shares keeps the rows in L2 and reads the weight once for every 8 row blocks.
    """
    row_blocks, tiles = cdiv(rows, s.BLOCK_M), cdiv(classes, s.BLOCK_N)
    turns = {
        n: cdiv(row_blocks * n, gpu.processors) * cdiv(tiles, n)
        for n in range(1, min(tiles, max(64, cdiv(gpu.processors, row_blocks))) + 1)
    }
    limit = 1.02 * min(turns.values())
    return min((n for n in turns if turns[n] <= limit), key=lambda n: (abs(n - 16), n))


def _shared_settings(gpu: Chip, p: Product) -> MatmulSettings:
    s = estimated_settings(gpu, p)
    return s._replace(SPLITS=share_count(gpu, s, p.M, p.N))


def _shares_fit(gpu: Chip, p: Product, s: MatmulSettings) -> bool:
    return tile_fits(gpu, p, s) and cdiv(p.N, s.BLOCK_N) >= s.SPLITS


statistics_settings = product_choice("logits_statistics", _shares_fit, _shared_settings)
gradient_settings = product_choice("logits_gradient", tile_fits, estimated_settings)


def _large(rows, classes, features):
    return min(rows, classes) >= 256 and features >= 64


def _operands(x, w, gpu, large):
    """Wrapped, and whether descriptors move them. Large ones are copied until they can."""
    x_, w_, _, aligned = wrapped(x, w, None)
    if not gpu.has_descriptors or not (aligned or large) or x.numel() == 0 or w.numel() == 0:
        return x_, w_, False
    return *movable(x_, w_, None)[:2], True


def logits_fwd(x, w, bias, target, head: Head, entropy: bool, precision, settings: MatmulSettings | None = None):
    """x (N, D), w (V, D), bias (V,) or None, target (N,) int64 -> scores (N,), lse (2, N), entropies (N,) or None.

    float32; lse: maximum and log of the sum of exponentials relative to it, in units of log2.
    settings.SPLITS: programs that share a row block.
    """
    (N, D), V = x.shape, w.shape[0]
    gpu = chip()
    dot = dot_precision(gpu, precision)
    x_, w_, descriptors = _operands(x, w, gpu, _large(N, V, D))
    product = _product(N, V, D, x.element_size(), dot, descriptors, x_.vector and w_.vector)
    s = settings or statistics_settings(gpu, product)
    extra = "entropy" if entropy else "sum" if head.smoothing else None
    part = torch.empty(s.SPLITS, 3 if extra is None else 4, N, dtype=torch.float32, device=x.device)
    score = torch.empty(N, dtype=torch.float32, device=x.device)
    lse = torch.empty(2, N, dtype=torch.float32, device=x.device)
    entropies = torch.empty_like(score) if entropy else None
    with on_device_of(x):
        _statistics_kernel[(cdiv(N, s.BLOCK_M) * s.SPLITS,)](
            part, *_loaded(x_, w_, s, descriptors), bias, target, *x_.t.stride(), *w_.t.stride(),
            N, V, D, cdiv(cdiv(V, s.BLOCK_N), s.SPLITS), _LOG2_E / head.temperature,
            extra, dot, D % s.BLOCK_K == 0 < D, descriptors, x_.k_major, w_.k_major,
            s.BLOCK_M, s.BLOCK_N, s.BLOCK_K, s.SPLITS, s.GROUP_M, num_warps=s.num_warps, num_stages=s.num_stages,
        )  # fmt: skip
        _combine_kernel[(cdiv(N, _COMBINED),)](
            score, lse, entropies, part, target, N, V, s.SPLITS, _LOG2_E / head.temperature, head.ignore_index, head.smoothing, head.sign,
            extra, _COMBINED, num_warps=4,
        )  # fmt: skip
    return score, lse, entropies


def _loaded(x, w, s, descriptors):
    if not descriptors:
        return x.t, w.t
    return x.descriptor(s.BLOCK_M, s.BLOCK_K), w.descriptor(s.BLOCK_N, s.BLOCK_K)


def chunk_size(rows: int, classes: int, itemsize: int, limit: int = CHUNK_BYTES) -> tuple[int, int]:
    """Rows and classes of a chunk of gradients of at most ``limit`` bytes; all chunks about as wide."""
    rows = min(rows, _CHUNK_ROWS)
    most = max(limit // (rows * itemsize) // 256, 1) * 256
    even = cdiv(classes, cdiv(classes, most))
    return rows, min(cdiv(even, 256) * 256, cdiv(classes, 16) * 16)


def logits_bwd(
    score_grad, entropy_grad, x, w, bias, target, lse, entropy, head: Head, needed, precision,
    settings: MatmulSettings | None = None, chunk: tuple[int, int] | None = None,
):  # fmt: skip
    """score_grad, entropy_grad (N,) float32, contiguous, entropy_grad and entropy None where there was none; lse of the
    forward -> dx (N, D), dw (V, D), db (V,), each None unless ``needed`` (three bools); score_grad is of the scores
    before ``head.sign``. chunk: its rows and classes.
    """
    (N, D), V = x.shape, w.shape[0]
    rows, classes = chunk or chunk_size(N, V, x.element_size())
    need_x, need_w, need_b = needed
    gpu = chip()
    if gpu.has_descriptors and _large(N, V, D):
        x = Operand(x)
        x = x.aligned(x.k_major).t

    def empty(*shape, dtype=x.dtype):
        return torch.empty(shape, dtype=dtype, device=x.device)

    buffer = empty(rows, cdiv(classes, 16) * 16)
    dx = empty(N, D) if need_x else None
    dw = empty(V, D, dtype=w.dtype) if need_w else None
    db = torch.zeros(V, dtype=torch.float32, device=x.device) if need_b else None
    single = x.dtype == torch.float32  # then the gradients are themselves what they are summed in
    dx_sum = dx if single or not need_x or classes >= V else empty(N, D, dtype=torch.float32)
    dw_sum = None if single or not need_w or rows >= N else empty(classes, D, dtype=torch.float32)
    for v in range(0, V, classes):
        w_chunk = Operand(w[v : v + classes])
        if gpu.has_descriptors and _large(N, V, D):
            w_chunk = w_chunk.aligned(w_chunk.k_major)
        w_chunk = w_chunk.t
        own = slice(v, v + len(w_chunk))
        for r in range(0, N, rows):
            part = slice(r, min(r + rows, N))
            x_rows = x[part]
            g = buffer[: len(x_rows), : len(w_chunk)]
            of_rows = (t if t is None else t[part] for t in (target, *lse, score_grad, entropy_grad, entropy))
            bias_chunk = None if bias is None else bias[own]
            _gradient(g, x_rows, w_chunk, bias_chunk, *of_rows, v, V, head, precision, settings)
            if need_x:
                out = dx if own.stop == V else dx_sum
                matmul(g, w_chunk.T, precision, out=out[part], addend=dx_sum[part] if v else None)
            if need_w or need_b:
                out = total = None
                if need_w:
                    total = dw[own] if dw_sum is None else dw_sum[: len(w_chunk)]
                    out = dw[own] if part.stop == N else total
                sums = matmul(
                    g.T, (x_rows if need_w else x_rows[:, :0]).T, precision,
                    sums_dtype=torch.float32 if need_b else None, out=out, addend=total if r else None,
                )[2]  # fmt: skip
                if need_b:
                    db[own] += sums
    return dx, dw, None if db is None else db.to(bias.dtype)


def _gradient(
    out, x, w, bias, target, peak, log_total, score_grad, entropy_grad, entropy,
    first_class, classes, head, precision, settings,
):  # fmt: skip
    """Fill out with the gradient at the products of rows x and of the classes w, first_class and on, of ``classes``."""
    (M, K), V = x.shape, w.shape[0]
    gpu = chip()
    dot = dot_precision(gpu, precision)
    x_, w_, descriptors = _operands(x, w, gpu, False)
    product = _product(M, V, K, x.element_size(), dot, descriptors, x_.vector and w_.vector)
    s = settings or gradient_settings(gpu, product)
    result, stride = out, out.stride(0)
    if descriptors:
        result = tensor_descriptor(out, [M, V], [stride, 1], [s.BLOCK_M, s.BLOCK_N // s.SUBTILES])
    with on_device_of(x):
        _gradient_kernel[(cdiv(M, s.BLOCK_M) * cdiv(V, s.BLOCK_N),)](
            result, *_loaded(x_, w_, s, descriptors), bias, target, peak, log_total, score_grad, entropy_grad, entropy,
            stride, *x_.t.stride(), *w_.t.stride(), M, V, K, first_class,
            _LOG2_E / head.temperature, 1.0 - head.smoothing, head.smoothing / classes, 1.0 / head.temperature,
            dot, K % s.BLOCK_K == 0 < K, descriptors, descriptors, x_.k_major, w_.k_major,
            s.BLOCK_M, s.BLOCK_N, s.BLOCK_K, s.GROUP_M, s.SUBTILES, num_warps=s.num_warps, num_stages=s.num_stages,
        )  # fmt: skip
