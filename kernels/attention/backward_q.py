"""Attention's backward for queries: a program per tile of queries; the formulas are in backward.py."""

import triton
import triton.language as tl

from ..launch.entry import entry
from .forward import ordered_tile
from .mask import in_base_2, kept, key_blocks, limits
from .tile import (
    add_products,
    head_statistics,
    in_elements,
    load_rows,
    part_count,
    part_width,
    products_of_rows,
    query_statistics,
    result_width,
    scaled_parts,
    scores,
    store_parts,
    without_padding,
    zero_parts,
)


@triton.jit
def _walk_keys(
    dq, begin, end, column, q, dout, lse, delta, k, v, strides, place, m, bounds, scoring,
    seed, threshold, gain, T, S, D, DV,
    MASKED: tl.constexpr, LENGTHS: tl.constexpr, LATE: tl.constexpr, ADDED: tl.constexpr, PRECISION: tl.constexpr,
    PRECISE: tl.constexpr, DESCRIPTORS: tl.constexpr, EVEN_D: tl.constexpr, EVEN_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add the keys in [begin, end) to dq of a tile of queries.

    q, dout: tiles; pointers with COLUMNS. strides: of q, dout, k, v. The rest as in the forward's ``_walk``.
    """
    strides_q, strides_do, strides_k, strides_v = strides
    b, h, h_kv, head = place
    scale, length = scoring[0], bounds[1]
    cap = scoring[1]
    BLOCK_C: tl.constexpr = part_width(BLOCK_D, COLUMNS)
    PARTS: tl.constexpr = part_count(D, COLUMNS)
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
            v_tile = load_rows(v, strides_v, b, h_kv, n, length, DV, BLOCK_N, BLOCK_DV, DESCRIPTORS, EVEN_DV, MASKED)
            if MASKED and LENGTHS and DESCRIPTORS:
                k_tile = without_padding(k_tile, n, length, BLOCK_N)
                v_tile = without_padding(v_tile, n, length, BLOCK_N)
            products = tl.dot(q, k_tile.T, input_precision=PRECISION)
        s, slope = scores(
            products, scoring, queries, keys, n, bounds, T, S, not LATE, MASKED, PRECISE
        )  # fmt: skip
        if LATE:
            p = tl.exp2(s * scale - lse[:, None])
        else:
            p = tl.exp2(in_base_2(s - lse[:, None], ADDED))
        if COLUMNS:
            dp = products_of_rows(
                dout, strides_do, h, m, T, v, strides_v, h_kv, n, length, b, DV,
                BLOCK_M, BLOCK_N, COLUMNS, True, MASKED, PRECISION,
            )  # fmt: skip
        else:
            dp = tl.dot(dout, v_tile.T, input_precision=PRECISION)
        if seed is not None:
            dp = tl.where(kept(seed, head, m, n, threshold, BLOCK_M, BLOCK_N), dp * gain, 0.0)
        ds = p * (dp - delta[:, None])
        if cap is not None:
            ds *= slope
        if COLUMNS:
            dq = add_products(
                dq, ds, k, strides_k, b, h_kv, n, length, column, D,
                BLOCK_N, BLOCK_C, PARTS, EVEN_D, MASKED, PRECISION,
            )  # fmt: skip
        else:
            dq = (tl.dot(ds.to(k_tile.dtype), k_tile, dq[0], input_precision=PRECISION),)
    return dq


@entry(do_not_specialize=["offset", "left", "right", "threshold", "T", "S", "heads_at_once"])
def attention_backward_q_kernel(
    dq,  # pointer or descriptor of (B, H, T, D)
    dout, q, k, v,  # the same of (B, H, T, DV), (B, H, T, D), (B, HK, S, D), (B, HK, S, DV)
    statistics_ptr,  # see ``attention_statistics``
    strides,  # of these five between sequences, heads and rows, in units of UNIT elements; the last axis is adjacent
    offsets_ptr, lengths_ptr, offset, left, right,  # these and the next two lines: as in the forward
    scale, cap, mask_ptr, strides_mask,
    seed_ptr, threshold, gain,
    dq_scale,  # what the sum of ds k is multiplied by
    B, H, T, S, heads_at_once,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, UNIT: tl.constexpr, PAD: tl.constexpr,
    LATE: tl.constexpr, EVEN_S: tl.constexpr, PRECISION: tl.constexpr, PRECISE: tl.constexpr,
    DESCRIPTORS: tl.constexpr, DESCRIPTORS_OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head; with COLUMNS, at most 128 columns of their gradient.

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
    strides_q, strides_do = in_elements(strides[2], UNIT), in_elements(strides[1], UNIT)
    strides_k, strides_v = in_elements(strides[3], UNIT), in_elements(strides[4], UNIT)
    if not COLUMNS:
        q = load_rows(q, strides_q, b, h, m, T, D, BLOCK_M, BLOCK_D, DESCRIPTORS, EVEN_D, True)
        dout = load_rows(dout, strides_do, b, h, m, T, DV, BLOCK_M, BLOCK_DV, DESCRIPTORS, EVEN_DV, True)
    statistics = query_statistics(head_statistics(statistics_ptr, head, T, PAD, ADDED), m, BLOCK_M, PAD, ADDED)
    lse = tl.load(statistics)
    delta = tl.load(statistics + PAD)
    BLOCK_C: tl.constexpr = part_width(BLOCK_D, COLUMNS)
    PARTS: tl.constexpr = part_count(D, COLUMNS)
    column = 0
    if COLUMNS:
        column = tl.program_id(1) * result_width(BLOCK_D, COLUMNS)
    dq_tile = zero_parts(BLOCK_M, BLOCK_C, PARTS)
    MASKED: tl.constexpr = right is not None or LENGTHS or not EVEN_S
    bounds = offset, length, left, right
    begin, full_begin, full_end, end = key_blocks(m, tl.minimum(m + BLOCK_M, T) - 1, bounds, S, BLOCK_N, MASKED)
    scoring = scale, cap, mask_ptr, strides_mask[2], strides_mask[3]
    for part in tl.static_range(3):  # in the order of the forward
        if part == 0:
            part_begin, part_end = full_end, end
        elif part == 1:
            part_begin, part_end = full_begin, full_end
        else:
            part_begin, part_end = begin, tl.minimum(full_begin, end)
        if part == 1 or (part == 0 and MASKED) or (part == 2 and left is not None):
            dq_tile = _walk_keys(
                dq_tile, part_begin, part_end, column, q, dout, lse, delta, k, v,
                (strides_q, strides_do, strides_k, strides_v), (b, h, h // GROUP, head), m, bounds, scoring,
                seed, threshold, gain, T, S, D, DV,
                part != 1, LENGTHS, LATE, ADDED, PRECISION, PRECISE, DESCRIPTORS, EVEN_D, EVEN_DV,
                BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, COLUMNS,
            )  # fmt: skip
    if ADDED:  # lse is without the sum of exponentials. Divided by here, it is one number less in the loops
        dq_tile = scaled_parts(dq_tile, (tl.exp2(-tl.load(statistics + 2 * PAD)) * dq_scale)[:, None], PARTS)
    else:
        dq_tile = scaled_parts(dq_tile, dq_scale, PARTS)
    strides_dq = in_elements(strides[0], UNIT)
    store_parts(dq, strides_dq, b, h, m, T, column, D, dq_tile, BLOCK_M, BLOCK_C, PARTS, DESCRIPTORS_OUT)
