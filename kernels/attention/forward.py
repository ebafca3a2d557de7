"""Attention's forward: one program per tile of queries walks over the keys with a running softmax.

For each block of keys, in base 2:  s = q k^T scale log2 e;  top' = max(top, max s);  p = exp2(s - top');
total = total exp2(top - top') + sum p;  acc = acc exp2(top - top') + p v.  At the end out = acc / total and
lse = top + log2(total). A query that sees nothing has total 0, out 0, lse -inf. Where a mask is added to the scores
they stay in base e, see ``in_base_2``, and lse is kept as two numbers, top and log2(total): the sum of a great and a
small number would be the great one, as where a query has a mask of -1e9 on all its keys.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import cdiv, chip_of, dot_precision, on_device_of
from ..launch.entry import entry
from .mask import Band, in_base_2, kept, key_blocks, limits
from .settings import AttentionProblem, AttentionSettings, burden_of, forward_choice
from .tile import (
    Scoring,
    add_products,
    block_width,
    described,
    descriptor,
    empty_like_rows,
    in_elements,
    load_rows,
    part_count,
    part_width,
    products_of_rows,
    result_programs,
    result_width,
    scaled_parts,
    scores,
    store_parts,
    strides_of,
    without_padding,
    zero_parts,
)


@triton.jit
def ordered_tile(pid, tiles, heads, HEAVY_FIRST: tl.constexpr, heads_at_once):
    """Program number -> (tile, head): the tiles of so many heads at a time that their keys and values stay in L2.

    HEAVY_FIRST: of those, the last tiles first, which see most keys under a causal mask.
    """
    section = pid // (heads_at_once * tiles)
    within = pid - section * heads_at_once * tiles
    here = tl.minimum(heads - section * heads_at_once, heads_at_once)
    tile = within // here
    if HEAVY_FIRST:
        tile = tiles - 1 - tile
    return tile, section * heads_at_once + within % here


@triton.jit
def _walk(
    sums, begin, end, column, q, k, v, strides, place, m, bounds, scoring, seed, threshold, T, S, D, DV,
    MASKED: tl.constexpr, LENGTHS: tl.constexpr, LATE: tl.constexpr, PRECISION: tl.constexpr, PRECISE: tl.constexpr,
    DESCRIPTORS: tl.constexpr, EVEN_D: tl.constexpr, EVEN_DV: tl.constexpr, ADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add the keys in [begin, end) to the sums of a tile of queries.

    sums: acc, total, top. q: a tile; a pointer with COLUMNS. strides: of q, k, v. place: sequence, query head, key
    head, number of the query head among all. MASKED: all blocks of keys need a mask, else none does.
    """
    acc, total, top = sums
    strides_q, strides_k, strides_v = strides
    b, h, h_kv, head = place
    scale, length = scoring[0], bounds[1]
    BLOCK_C: tl.constexpr = part_width(BLOCK_DV, COLUMNS)
    PARTS: tl.constexpr = part_count(DV, COLUMNS)
    queries = (m + tl.arange(0, BLOCK_M))[:, None]
    for n in range(begin, end, BLOCK_N):
        keys = (n + tl.arange(0, BLOCK_N))[None, :]
        if COLUMNS:
            products = products_of_rows(
                q, strides_q, h, m, T, k, strides_k, h_kv, n, length, b, D,
                BLOCK_M, BLOCK_N, COLUMNS, True, MASKED, PRECISION,
            )  # fmt: skip
        else:
            k_tile = load_rows(k, strides_k, b, h_kv, n, length, D, BLOCK_N, BLOCK_D, DESCRIPTORS, EVEN_D, MASKED)
            products = tl.dot(q, k_tile.T, input_precision=PRECISION)
        s, _ = scores(
            products, scoring, queries, keys, n, bounds, T, S, not LATE, MASKED, PRECISE
        )  # fmt: skip
        if LATE:
            new_top = tl.maximum(top, tl.max(s, 1) * scale)
            safe = tl.where(new_top == float("-inf"), 0.0, new_top)
            p = tl.exp2(s * scale - safe[:, None])
        else:
            new_top = tl.maximum(top, tl.max(s, 1))
            safe = tl.where(new_top == float("-inf"), 0.0, new_top)
            p = tl.exp2(in_base_2(s - safe[:, None], ADDED))
        shrink = tl.exp2(in_base_2(top - safe, ADDED))
        total = total * shrink + tl.sum(p, 1)
        acc = scaled_parts(acc, shrink[:, None], PARTS)
        if seed is not None:
            p = tl.where(kept(seed, head, m, n, threshold, BLOCK_M, BLOCK_N), p, 0.0)
        if COLUMNS:
            acc = add_products(
                acc, p, v, strides_v, b, h_kv, n, length, column, DV,
                BLOCK_N, BLOCK_C, PARTS, EVEN_DV, MASKED, PRECISION,
            )  # fmt: skip
        else:
            v_tile = load_rows(v, strides_v, b, h_kv, n, length, DV, BLOCK_N, BLOCK_DV, DESCRIPTORS, EVEN_DV, MASKED)
            if MASKED and LENGTHS and DESCRIPTORS:
                v_tile = without_padding(v_tile, n, length, BLOCK_N)
            acc = (tl.dot(p.to(v_tile.dtype), v_tile, acc[0], input_precision=PRECISION),)
        top = new_top
    return acc, total, top


@entry(do_not_specialize=["offset", "left", "right", "threshold", "T", "S", "heads_at_once"])
def attention_forward_kernel(
    q, k, v, out,  # pointers or descriptors of (B, H, T, D), (B, HK, S, D), (B, HK, S, DV), (B, H, T, DV)
    lse_ptr,  # (B, H, T) or None; (2, B, H, T) where a mask is added
    strides,  # of q, k, v, out between sequences, heads and rows, in units of UNIT elements; the last axis is adjacent
    offsets_ptr, lengths_ptr, offset, left, right,  # (B,) or None, twice; for the rest see mask.py
    scale, cap, mask_ptr, strides_mask,  # mask (B, H, T, S) uint8 or floating, or None; see ``scores``
    seed_ptr, threshold, gain,  # (1,) or None; of dropout, see ``kept``
    B, H, T, S, heads_at_once,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, UNIT: tl.constexpr,  # GROUP: query heads of a key head
    LATE: tl.constexpr,  # the scale is applied in the exponential's argument
    EVEN_S: tl.constexpr, PRECISION: tl.constexpr, PRECISE: tl.constexpr,
    DESCRIPTORS: tl.constexpr, DESCRIPTOR_OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head; with COLUMNS, at most 128 columns of their result.

    It walks over the blocks of keys that these queries see.
    """
    tile, head = ordered_tile(tl.program_id(0), tl.cdiv(T, BLOCK_M), B * H, right is not None, heads_at_once)
    b, h, m = head // H, head % H, tile * BLOCK_M
    offset, length = limits(offset, offsets_ptr, lengths_ptr, b, S)
    seed = None
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    if mask_ptr is not None:
        mask_ptr += b.to(tl.int64) * strides_mask[0] + h.to(tl.int64) * strides_mask[1]

    LENGTHS: tl.constexpr = lengths_ptr is not None
    ADDED: tl.constexpr = mask_ptr is not None and mask_ptr.dtype.element_ty != tl.uint8
    EVEN_D: tl.constexpr = D == BLOCK_D
    EVEN_DV: tl.constexpr = DV == BLOCK_DV
    sources = in_elements(strides[0], UNIT), in_elements(strides[1], UNIT), in_elements(strides[2], UNIT)
    strides_o = in_elements(strides[3], UNIT)
    if not COLUMNS:
        q = load_rows(q, sources[0], b, h, m, T, D, BLOCK_M, BLOCK_D, DESCRIPTORS, EVEN_D, True)
    top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    BLOCK_C: tl.constexpr = part_width(BLOCK_DV, COLUMNS)
    PARTS: tl.constexpr = part_count(DV, COLUMNS)
    column = 0
    if COLUMNS:
        column = tl.program_id(1) * result_width(BLOCK_DV, COLUMNS)
    sums = zero_parts(BLOCK_M, BLOCK_C, PARTS), total, top
    MASKED: tl.constexpr = right is not None or LENGTHS or not EVEN_S
    bounds = offset, length, left, right
    begin, full_begin, full_end, end = key_blocks(m, tl.minimum(m + BLOCK_M, T) - 1, bounds, S, BLOCK_N, MASKED)
    scoring = scale, cap, mask_ptr, strides_mask[2], strides_mask[3]
    for part in tl.static_range(3):
        # First the last blocks of keys, which need a mask: that loop always runs. Then those that need none, and where
        # a window begins those before them
        if part == 0:
            part_begin, part_end = full_end, end
        elif part == 1:
            part_begin, part_end = full_begin, full_end
        else:
            part_begin, part_end = begin, tl.minimum(full_begin, end)
        if part == 1 or (part == 0 and MASKED) or (part == 2 and left is not None):
            sums = _walk(
                sums, part_begin, part_end, column, q, k, v, sources, (b, h, h // GROUP, head), m, bounds, scoring,
                seed, threshold, T, S, D, DV,
                part != 1, LENGTHS, LATE, PRECISION, PRECISE, DESCRIPTORS, EVEN_D, EVEN_DV, ADDED,
                BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, COLUMNS,
            )  # fmt: skip

    acc, total, top = sums
    shrink = 1.0 / tl.where(total == 0, 1.0, total)
    if seed_ptr is not None:
        shrink *= gain
    acc = scaled_parts(acc, shrink[:, None], PARTS)
    store_parts(out, strides_o, b, h, m, T, column, DV, acc, BLOCK_M, BLOCK_C, PARTS, DESCRIPTOR_OUT)
    if lse_ptr is not None:  # programs of other columns write the same
        rows = m + tl.arange(0, BLOCK_M)
        lse_ptr += head.to(tl.int64) * T
        if ADDED:
            tl.store(lse_ptr + rows, top, mask=rows < T)
            lse_ptr += tl.cast(B, tl.int64) * H * T
            tl.store(lse_ptr + rows, tl.log2(total), mask=rows < T)
        else:
            tl.store(lse_ptr + rows, top + tl.log2(total), mask=rows < T)


_CACHED = 16 << 20  # bytes of keys and values that programs at work share in L2


def heads_at_once(H: int, HK: int, S: int, D: int, DV: int, itemsize: int) -> int:
    """Query heads whose keys and values stay in L2 together; those that share them count once."""
    return max(1, _CACHED // max(1, S * (D + DV) * itemsize)) * (H // HK)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, band: Band, scoring: Scoring, precision: str, keep: bool,
    settings: AttentionSettings | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """q (B, H, T, D), k (B, HK, S, D), v (B, HK, S, DV), last stride 1 -> out (B, H, T, DV), lse (B, H, T) or None.

    out lies in memory as q. lse: base-2 logarithm of the sum of exponentials, float32, where ``keep``. With a mask that
    is added, lse (2, B, H, T): the greatest score, and the base-2 logarithm of the sum of exponentials relative to it.
    """
    (B, H, T, D), (_, HK, S, DV) = q.shape, v.shape
    out = empty_like_rows(q, DV)
    statistics = (2, B, H, T) if scoring.added else (B, H, T)
    lse = torch.empty(statistics, dtype=torch.float32, device=q.device) if keep else None
    if B * H * T == 0:
        return out, lse
    if S == 0 or DV == 0:
        return out.zero_(), lse if lse is None else lse.fill_(float("-inf"))
    gpu, scoring = chip_of(q), scoring.aligned()
    descriptors = gpu.has_descriptors and q.element_size() == 2 and all(described(t) for t in (q, k, v))
    block_d, block_dv = block_width(D), block_width(DV)
    dot = dot_precision(gpu, precision)
    burden = burden_of(scoring, band.lengths is not None, False)
    problem = AttentionProblem.of(q, k, v, B * H, band, descriptors, burden, dot, max(block_d, block_dv))
    settings = settings or forward_choice(gpu, problem)
    descriptor_out = descriptors and described(out)
    at_once = min(B * H, heads_at_once(H, HK, S, D, DV, q.element_size()))
    strides, unit = strides_of((q, k, v, out), (*(descriptors,) * 3, descriptor_out))
    operands = q, k, v
    if descriptors:
        rows = settings.BLOCK_M, settings.BLOCK_N, settings.BLOCK_N
        operands = tuple(descriptor(t, n) for t, n in zip(operands, rows, strict=True))
    with on_device_of(q):
        attention_forward_kernel[(B * H * cdiv(T, settings.BLOCK_M), result_programs(DV, settings.COLUMNS))](
            *operands, descriptor(out, settings.BLOCK_M) if descriptor_out else out, lse,
            strides, band.offsets, band.lengths, band.offset, band.left, band.right, *scoring.arguments(),
            B, H, T, S, at_once, H // HK, D, DV, unit,
            scoring.scaled_late, S % settings.BLOCK_N == 0, dot, scoring.precise(q.dtype),
            descriptors, descriptor_out, settings.BLOCK_M, settings.BLOCK_N, block_d, block_dv, settings.COLUMNS,
            num_warps=settings.num_warps, num_stages=settings.num_stages,
        )  # fmt: skip
    return out, lse
