"""Attention's backward for keys and values: a program per tile of keys; the formulas are in backward.py."""

import triton
import triton.language as tl

from ..launch.entry import entry
from .forward import ordered_tile
from .mask import FIRST_LOOP_RUNS, INVARIANTS_KEPT, in_base_2, kept, limits, query_blocks
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
def _walk_queries(
    dk, dv, begin, end, column, k, v, q, dout, strides, statistics_ptr, place, n, bounds, scoring,
    seed, threshold, gain, T, S, D, DV,
    MASKED: tl.constexpr, PAD: tl.constexpr, LATE: tl.constexpr, ADDED: tl.constexpr, PRECISION: tl.constexpr,
    PRECISE: tl.constexpr, DESCRIPTORS: tl.constexpr, EVEN_D: tl.constexpr, EVEN_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, COLUMNS: tl.constexpr,
    ANEW: tl.constexpr, WITH_DK: tl.constexpr, WITH_DV: tl.constexpr,
):  # fmt: skip
    """Add the queries of one head in [begin, end) to dk and dv of a tile of keys; tiles lie (keys, queries).

    dk, dv: empty where not wanted. k, v: tiles; pointers with COLUMNS. strides: of k, v, q, dout. place: sequence,
    query head, key head, number of the query head among all. MASKED: all blocks of queries need a mask, else none does.
    ANEW: compute in each step what stays the same, to save registers.
    """
    strides_k, strides_v, strides_q, strides_do = strides
    b, h, h_kv, head = place
    scale, length = scoring[0], bounds[1]
    cap = scoring[1]
    C_D: tl.constexpr = part_width(BLOCK_D, COLUMNS)
    C_DV: tl.constexpr = part_width(BLOCK_DV, COLUMNS)
    PARTS_D: tl.constexpr = part_count(D, COLUMNS)
    PARTS_DV: tl.constexpr = part_count(DV, COLUMNS)
    keys = (n + tl.arange(0, BLOCK_N))[:, None]
    for m in tl.range(begin, end, BLOCK_M, disable_licm=ANEW):
        rows = m + tl.arange(0, BLOCK_M)
        statistics = query_statistics(statistics_ptr, m, BLOCK_M, PAD, ADDED)
        if COLUMNS:
            products = products_of_rows(
                k, strides_k, h_kv, n, length, q, strides_q, h, m, T, b, D,
                BLOCK_N, BLOCK_M, COLUMNS, True, True, PRECISION,
            )  # fmt: skip
        else:
            dout_tile = load_rows(dout, strides_do, b, h, m, T, DV, BLOCK_M, BLOCK_DV, DESCRIPTORS, EVEN_DV, True)
            if WITH_DK:  # before p: then fewer values live at once
                dp = tl.dot(v, dout_tile.T, input_precision=PRECISION)
                if seed is None:
                    dp -= tl.load(statistics + PAD)[None, :]
            q_tile = load_rows(q, strides_q, b, h, m, T, D, BLOCK_M, BLOCK_D, DESCRIPTORS, EVEN_D, True)
            products = tl.dot(k, q_tile.T, input_precision=PRECISION)
        s, slope = scores(
            products, scoring, rows[None, :], keys, n, bounds, T, S, not LATE, MASKED, PRECISE
        )  # fmt: skip
        lse = tl.load(statistics)
        if LATE:
            p = tl.exp2(s * scale - lse[None, :])
        elif ADDED:
            p = tl.exp2(in_base_2(s - lse[None, :], ADDED) - tl.load(statistics + 2 * PAD)[None, :])
        else:
            p = tl.exp2(s - lse[None, :])
        weights = p
        if seed is not None:
            keep = kept(seed, head, m, n, threshold, BLOCK_M, BLOCK_N).T
            weights = tl.where(keep, p, 0.0)
        if COLUMNS:
            if WITH_DV:
                dv = add_products(
                    dv, weights, dout, strides_do, b, h, m, T, column, DV,
                    BLOCK_M, C_DV, PARTS_DV, EVEN_DV, True, PRECISION,
                )  # fmt: skip
            if WITH_DK:
                dp = products_of_rows(
                    v, strides_v, h_kv, n, length, dout, strides_do, h, m, T, b, DV,
                    BLOCK_N, BLOCK_M, COLUMNS, True, True, PRECISION,
                )  # fmt: skip
        elif WITH_DV:
            dv = (tl.dot(weights.to(dout_tile.dtype), dout_tile, dv[0], input_precision=PRECISION),)
        if WITH_DK:
            if seed is not None:
                dp = tl.where(keep, dp * gain, 0.0)
            if seed is not None or COLUMNS:
                dp -= tl.load(statistics + PAD)[None, :]
            ds = p * dp
            if cap is not None:
                ds *= slope
            if COLUMNS:
                dk = add_products(
                    dk, ds, q, strides_q, b, h, m, T, column, D,
                    BLOCK_M, C_D, PARTS_D, EVEN_D, True, PRECISION,
                )  # fmt: skip
            else:
                dk = (tl.dot(ds.to(q_tile.dtype), q_tile, dk[0], input_precision=PRECISION),)
    return dk, dv


@entry(do_not_specialize=["offset", "left", "right", "threshold", "T", "S", "heads_at_once"])
def attention_backward_kv_kernel(
    dk, dv,  # pointers or descriptors of (B, HK, S, D), (B, HK, S, DV); one of them may be None
    dout, q, k, v,  # the same of (B, H, T, DV), (B, H, T, D), (B, HK, S, D), (B, HK, S, DV)
    statistics_ptr,  # see ``attention_statistics``
    strides,  # of these six between sequences, heads and rows, in units of UNIT elements; the last axis is adjacent
    offsets_ptr, lengths_ptr, offset, left, right,  # these and the next two lines: as in the forward
    scale, cap, mask_ptr, strides_mask,
    seed_ptr, threshold, gain,
    dk_scale,  # what the sum of ds q is multiplied by
    B, H, T, S, heads_at_once,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, UNIT: tl.constexpr, PAD: tl.constexpr,
    LATE: tl.constexpr, EVEN_S: tl.constexpr, PRECISION: tl.constexpr, PRECISE: tl.constexpr,
    DESCRIPTORS: tl.constexpr, DESCRIPTORS_OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N keys of one key head; with COLUMNS, at most 128 columns of their gradients.

    It walks over the queries that see these keys, in all heads of the group.
    """
    HK = H // GROUP
    # Under a causal mask the first keys are seen by most queries: heavy tiles come first as they are
    tile, head_kv = ordered_tile(tl.program_id(0), tl.cdiv(S, BLOCK_N), B * HK, False, heads_at_once)
    b, h_kv, n = head_kv // HK, head_kv % HK, tile * BLOCK_N
    offset, length = limits(offset, offsets_ptr, lengths_ptr, b, S)
    seed = None
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)

    LENGTHS: tl.constexpr = lengths_ptr is not None
    ADDED: tl.constexpr = mask_ptr is not None and mask_ptr.dtype.element_ty != tl.uint8
    EVEN_D: tl.constexpr = D == BLOCK_D
    EVEN_DV: tl.constexpr = DV == BLOCK_DV
    strides_q, strides_do = in_elements(strides[3], UNIT), in_elements(strides[2], UNIT)
    strides_k, strides_v = in_elements(strides[4], UNIT), in_elements(strides[5], UNIT)
    if not COLUMNS:
        k = load_rows(k, strides_k, b, h_kv, n, length, D, BLOCK_N, BLOCK_D, DESCRIPTORS, EVEN_D, True)
        if dk is not None:
            v = load_rows(v, strides_v, b, h_kv, n, length, DV, BLOCK_N, BLOCK_DV, DESCRIPTORS, EVEN_DV, True)
    C_D: tl.constexpr = part_width(BLOCK_D, COLUMNS)
    C_DV: tl.constexpr = part_width(BLOCK_DV, COLUMNS)
    PARTS_D: tl.constexpr = part_count(D, COLUMNS)
    PARTS_DV: tl.constexpr = part_count(DV, COLUMNS)
    column = 0
    if COLUMNS:
        column = tl.program_id(1) * result_width(BLOCK_D if dk is not None else BLOCK_DV, COLUMNS)
    WITH_DK: tl.constexpr = dk is not None
    WITH_DV: tl.constexpr = dv is not None
    dk_tile, dv_tile = (), ()
    if WITH_DK:
        dk_tile = zero_parts(BLOCK_N, C_D, PARTS_D)
    if WITH_DV:
        dv_tile = zero_parts(BLOCK_N, C_DV, PARTS_DV)
    MASKED: tl.constexpr = right is not None or LENGTHS or not EVEN_S
    SCORED: tl.constexpr = mask_ptr is not None or seed_ptr is not None or cap is not None
    ANEW: tl.constexpr = INVARIANTS_KEPT and (SCORED or BLOCK_D == 256 or BLOCK_DV == 256)
    TELL: tl.constexpr = FIRST_LOOP_RUNS or (mask_ptr is not None and LENGTHS)
    bounds = offset, length, left, right
    begin, full_begin, full_end, end = query_blocks(n, BLOCK_N, bounds, T, BLOCK_M, MASKED, TELL)
    for g in tl.range(GROUP, disable_licm=ANEW):
        h = h_kv * GROUP + g
        head = b * H + h
        statistics = head_statistics(statistics_ptr, head, T, PAD, ADDED)
        scoring = scale, cap, mask_ptr, strides_mask[2], strides_mask[3]
        if mask_ptr is not None:
            mask_head = mask_ptr + b.to(tl.int64) * strides_mask[0] + h.to(tl.int64) * strides_mask[1]
            scoring = scale, cap, mask_head, strides_mask[2], strides_mask[3]
        for part in tl.static_range(3):
            # The first blocks of queries, which need a mask; those that need none; where a window ends, those after it
            if part == 0:
                part_begin, part_end = begin, full_begin
            elif part == 1:
                part_begin, part_end = full_begin, full_end
            else:
                part_begin, part_end = full_end, end
            if part == 1 or (part == 0 and MASKED) or (part == 2 and left is not None):
                dk_tile, dv_tile = _walk_queries(
                    dk_tile, dv_tile, part_begin, part_end, column, k, v, q, dout,
                    (strides_k, strides_v, strides_q, strides_do), statistics, (b, h, h_kv, head), n, bounds, scoring,
                    seed, threshold, gain, T, S, D, DV,
                    part != 1, PAD, LATE, ADDED, PRECISION, PRECISE, DESCRIPTORS, EVEN_D, EVEN_DV,
                    BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, COLUMNS, ANEW, WITH_DK, WITH_DV,
                )  # fmt: skip
    if LENGTHS and DESCRIPTORS:  # whatever stood past the length is in the rows of its own keys alone
        if WITH_DK:
            dk_tile = (without_padding(dk_tile[0], n, length, BLOCK_N),)
        if WITH_DV:
            dv_tile = (without_padding(dv_tile[0], n, length, BLOCK_N),)
    if WITH_DV:
        if seed_ptr is not None:
            dv_tile = scaled_parts(dv_tile, gain, PARTS_DV)
        strides_dv = in_elements(strides[1], UNIT)
        store_parts(dv, strides_dv, b, h_kv, n, S, column, DV, dv_tile, BLOCK_N, C_DV, PARTS_DV, DESCRIPTORS_OUT)
    if WITH_DK:
        dk_tile = scaled_parts(dk_tile, dk_scale, PARTS_D)
        strides_dk = in_elements(strides[0], UNIT)
        store_parts(dk, strides_dk, b, h_kv, n, S, column, D, dk_tile, BLOCK_N, C_D, PARTS_D, DESCRIPTORS_OUT)
