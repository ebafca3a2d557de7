"""Forward of the loss heads: softmax statistics of the logits. See __init__.py."""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import Chip, cdiv, chip_of, dot_precision, on_device_of
from ..launch.descriptor import strides_beside, tensor_descriptor
from ..launch.entry import entry
from ..product import MatmulSettings, Product, estimated_settings, product_choice, tile_fits
from ..tile import LOG2_E, grouped_tile
from . import (
    LEAST,
    LN_2,
    LOWEST,
    Head,
    any_within,
    large,
    loaded,
    operands,
    padded,
    product_of,
    products_tile,
    registers,
)

_COMBINED = 128  # rows of a program that combines shares


@triton.jit
def _rescale(extra, total, peak, base):
    """sum e (z - peak) with e = 2^(z - peak) and total = sum e -> the same sum relative to base."""
    # Where the difference is less than LEAST the power is 0, and what it multiplies must be finite.
    return tl.exp2(peak - base) * (extra + tl.maximum(peak - base, LEAST) * total)


@triton.jit
def _store_parts(tile, out, m, v, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, SUBTILES: tl.constexpr):
    """Store a tile by a descriptor in column parts, which take turns in the shared memory of one."""
    if SUBTILES > 1:
        HALF: tl.constexpr = BLOCK_V // 2
        left, right = tile.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
        _store_parts(left, out, m, v, BLOCK_M, HALF, SUBTILES // 2)
        _store_parts(right, out, m, v + HALF, BLOCK_M, HALF, SUBTILES // 2)
    else:
        out.store([m, v], tile)


@entry
def logits_statistics_kernel(
    part_ptr,  # (SPLITS, 3 or 4, M) float32: maximum * scale, sum of exponentials, target's logit, extra
    kept, kept_columns,  # None, or where the logits before the scale go: (M, kept_columns), 0 beyond V
    x, w, bias_ptr, target_ptr,  # x (M, K), w (V, K): pointers or descriptors
    strides_x, strides_w,  # in elements
    M, V, K, tiles_per_split, scale,
    EXTRA: tl.constexpr,  # "entropy", "sum" or None
    PRECISION: tl.constexpr, EVEN_K: tl.constexpr, DESCRIPTORS: tl.constexpr,  # of the operands and of kept
    X_K_MAJOR: tl.constexpr, W_K_MAJOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr, GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,  # column parts in which a tile is kept
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
        z = products_tile(
            x, w, m, v, M, V, K, strides_x, strides_w,
            PRECISION, EVEN_K, DESCRIPTORS, X_K_MAJOR, W_K_MAJOR, BLOCK_M, BLOCK_V, BLOCK_K,
        )  # fmt: skip
        offs_v = v + tl.arange(0, BLOCK_V)
        if bias_ptr is not None:
            z += tl.load(bias_ptr + offs_v, mask=offs_v < V, other=0.0).to(tl.float32)[None, :]
        if kept is not None:  # rounded before the statistics: the backward's probabilities must add up to 1
            if DESCRIPTORS:
                rounded = z.to(kept.dtype)
                _store_parts(rounded, kept, m, v, BLOCK_M, BLOCK_V, SUBTILES)
            else:
                rounded = z.to(kept.dtype.element_ty)
                inside = (offs_m < M)[:, None] & (offs_v < kept_columns)[None, :]
                tl.store(kept + offs_m.to(tl.int64)[:, None] * kept_columns + offs_v[None, :], rounded, mask=inside)
            z = rounded.to(tl.float32)
        if EXTRA == "sum":  # 0 outside the vocabulary
            extra += tl.sum(z, axis=1)
        if v + BLOCK_V > V:
            z = tl.where((offs_v < V)[None, :], z, float("-inf"))
        if any_within(target, v, BLOCK_V):
            chosen += tl.sum(tl.where(offs_v[None, :] == target[:, None], z, 0.0), axis=1)
        top = tl.maximum(peak, tl.max(z, axis=1) * scale)  # drops NaN, which the sum of exponentials keeps
        base = tl.where(top == float("-inf"), 0.0, top)
        log_e = z * scale - base[:, None]  # one multiply-add, and so no rounding at the size of z
        e = tl.exp2(log_e)
        if EXTRA == "entropy":
            extra = _rescale(extra, total, peak, base) + tl.sum(e * tl.maximum(log_e, LEAST), axis=1)
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
def logits_combine_kernel(
    score_ptr, lse_ptr, entropy_ptr,  # (M,), (2, M), (M,) float32; lse: maximum, log2 of the sum relative to it
    part_ptr, target_ptr, M, V, splits, scale, ignore_index, smoothing, sign,  # ignore_index: None if none is ignored
    EXTRA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the shares of BLOCK rows, combined in order. A target outside the vocabulary gives NaN.

    Score and entropy of an ignored row are 0.
    """
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
    of_target = chosen * scale
    score = of_target - peak - log_total
    if EXTRA == "sum":
        score = (1.0 - smoothing) * score + smoothing * (extra / V * scale - peak - log_total)
    score *= LN_2
    if EXTRA != "sum":  # of a class that a large finite number masks: in units of log2 it might not be finite
        beyond = (chosen > float("-inf")) & (of_target == float("-inf")) & (peak > float("-inf"))
        score = tl.where(beyond, tl.maximum(chosen * (scale * LN_2), LOWEST), score)
    score *= sign
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
        entropy = (log_total - extra / total) * LN_2
        if ignore_index is not None:
            entropy = tl.where(ignored, 0.0, entropy)
        tl.store(entropy_ptr + offs, entropy, mask=rows)


@functools.lru_cache(maxsize=4096)
def share_count(gpu: Chip, s: MatmulSettings, rows: int, classes: int) -> int:
    """How many programs share the vocabulary of a row block.

    Of all numbers that let the last program end within 2 % of the earliest possible, the nearest to 16: a wave of 8
    row blocks by 16 shares keeps the rows in L2 and reads the weight once for every 8 row blocks.
    """
    row_blocks, tiles = cdiv(rows, s.BLOCK_M), cdiv(classes, s.BLOCK_N)
    turns = {
        n: cdiv(row_blocks * n, gpu.processors) * cdiv(tiles, n)
        for n in range(1, min(tiles, max(64, cdiv(gpu.processors, row_blocks))) + 1)
    }
    limit = 1.02 * min(turns.values())
    return min((n for n in turns if turns[n] <= limit), key=lambda n: (abs(n - 16), n))


def _statistics_default(gpu: Chip, p: Product) -> MatmulSettings:
    s = estimated_settings(gpu, p)
    return s._replace(SPLITS=share_count(gpu, s, p.M, p.N))


def _shares_fit(gpu: Chip, p: Product, s: MatmulSettings) -> bool:
    return tile_fits(gpu, p, s) and cdiv(p.N, s.BLOCK_N) >= s.SPLITS


statistics_choice = product_choice("logits_statistics", _shares_fit, _statistics_default)


def logits_fwd(
    x: Tensor, w: Tensor, bias: Tensor | None, target: Tensor, head: Head, entropy: bool, precision: str,
    settings: MatmulSettings | None = None, keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """x (N, D), w (V, D), bias (V,) or None, target (N,) int64 -> scores (N,), lse (2, N), entropies (N,) or None, and
    with ``keep`` the logits before the temperature (N, V rounded up to 16), zeros behind V, otherwise None.

    float32, the logits in the dtype of x; lse: maximum and log of the sum of exponentials relative to it, in units of
    log2. settings.SPLITS: programs that share a row block.
    """
    (N, D), V = x.shape, w.shape[0]
    gpu = chip_of(x)
    dot = dot_precision(gpu, precision)
    x_, w_, descriptors = operands(x, w, gpu, large(N, V, D))
    problem = product_of(N, V, D, x.element_size(), dot, descriptors, x_.vector and w_.vector)
    settings = settings or statistics_choice(gpu, problem)
    extra = "entropy" if entropy else "sum" if head.smoothing else None
    part = torch.empty(settings.SPLITS, 3 if extra is None else 4, N, dtype=torch.float32, device=x.device)
    score = torch.empty(N, dtype=torch.float32, device=x.device)
    lse = torch.empty(2, N, dtype=torch.float32, device=x.device)
    entropies = torch.empty_like(score) if entropy else None
    columns, scale = padded(V), LOG2_E.value / head.temperature
    kept = torch.empty(N, columns, dtype=x.dtype, device=x.device) if keep else None
    place = kept
    if keep and descriptors:
        part_shape = [settings.BLOCK_M, settings.BLOCK_N // settings.SUBTILES]
        place = tensor_descriptor(kept, [N, columns], [columns, 1], part_shape)
        # While one tile's last part is on its way, the next tile's operands arrive: all of them need shared memory.
        room = gpu._replace(shared=gpu.shared - math.prod(part_shape) * x.element_size())
        while settings.num_stages > 2 and not tile_fits(room, problem, settings):
            settings = settings._replace(num_stages=settings.num_stages - 1)
    with on_device_of(x):
        logits_statistics_kernel[(cdiv(N, settings.BLOCK_M) * settings.SPLITS,)](
            part, place, columns, *loaded(x_, w_, settings, descriptors), bias, target,
            *strides_beside(descriptors, 2, x_.t, w_.t),
            N, V, D, cdiv(cdiv(V, settings.BLOCK_N), settings.SPLITS), scale,
            extra, dot, D % settings.BLOCK_K == 0 < D, descriptors, x_.k_major, w_.k_major,
            settings.BLOCK_M, settings.BLOCK_N, settings.BLOCK_K,
            settings.SPLITS, settings.GROUP_M, settings.SUBTILES if keep else 1,
            num_warps=settings.num_warps, num_stages=settings.num_stages,
            # Beside logits that are kept only one program has room
            **({} if keep else registers(gpu, settings, x.element_size(), descriptors)),
        )  # fmt: skip
        logits_combine_kernel[(cdiv(N, _COMBINED),)](
            score, lse, entropies, part, target, N, V, settings.SPLITS, scale,
            head.ignore_index, head.smoothing, head.sign, extra, _COMBINED, num_warps=4,
        )  # fmt: skip
    return score, lse, entropies, kept
