"""Attention's backward for keys and values: a program per tile of keys; the formulas are in attention_backward.py."""

import triton
import triton.language as tl

from .attention_forward import ordered_tile
from .attention_mask import FIRST_LOOP_RUNS, INVARIANTS_KEPT, in_base_2, kept, limits, query_blocks
from .attention_tile import (
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
)  # fmt: skip
from .entry import entry


@triton.jit
def _walk_queries(
    dk, dv, begin, end, column, k, v, q, dout, strides_k, strides_v, strides_q, strides_do, statistics_ptr,
    b, h, h_kv, head, n, offset, length, left, right, scale, cap, mask_ptr, stride_mt, stride_ms,
    seed, threshold, gain, T, S, D, DV,
    MASKED: tl.constexpr, PAD: tl.constexpr, LATE: tl.constexpr, ADDED: tl.constexpr, PRECISION: tl.constexpr,
    PRECISE: tl.constexpr, DESCRIPTORS: tl.constexpr, EVEN_D: tl.constexpr, EVEN_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, COLUMNS: tl.constexpr,
    ANEW: tl.constexpr, WITH_DK: tl.constexpr, WITH_DV: tl.constexpr,
):  # fmt: skip
    """The queries of one head in [begin, end); tiles lie (keys, queries). k, v: tiles; pointers with COLUMNS.

    dk, dv: empty where not wanted. ANEW: compute in each step what stays the same, to save registers.
    """
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
            products, scale, cap, rows[None, :], keys, n, offset, length, left, right, mask_ptr, stride_mt, stride_ms,
            T, S, not LATE, MASKED, PRECISE,
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
    dk, dv, dout, q, k, v, statistics_ptr,  # dk or dv may be None
    sdkb, sdkh, sdks, sdvb, sdvh, sdvs, sdob, sdoh, sdot, sqb, sqh, sqt, skb, skh, sks, svb, svh, svs,
    offsets_ptr, lengths_ptr, offset, left, right,
    scale, cap, mask_ptr, smb, smh, smt, sms, seed_ptr, threshold, gain, dk_scale,
    B, H, T, S, heads_at_once,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, UNIT: tl.constexpr, PAD: tl.constexpr,
    LATE: tl.constexpr, EVEN_S: tl.constexpr, PRECISION: tl.constexpr, PRECISE: tl.constexpr,
    DESCRIPTORS: tl.constexpr, DESCRIPTORS_OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
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
    strides_q, strides_do = in_elements(sqb, sqh, sqt, UNIT), in_elements(sdob, sdoh, sdot, UNIT)
    strides_k, strides_v = in_elements(skb, skh, sks, UNIT), in_elements(svb, svh, svs, UNIT)
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
    begin, full_begin, full_end, end = query_blocks(n, BLOCK_N, offset, length, left, right, T, BLOCK_M, MASKED, TELL)
    for g in tl.range(GROUP, disable_licm=ANEW):
        h = h_kv * GROUP + g
        head = b * H + h
        statistics = head_statistics(statistics_ptr, head, T, PAD, ADDED)
        mask_head = None
        if mask_ptr is not None:
            mask_head = mask_ptr + b.to(tl.int64) * smb + h.to(tl.int64) * smh
        if MASKED:
            dk_tile, dv_tile = _walk_queries(
                dk_tile, dv_tile, begin, full_begin, column, k, v, q, dout,
                strides_k, strides_v, strides_q, strides_do, statistics, b, h, h_kv, head, n,
                offset, length, left, right, scale, cap, mask_head, smt, sms, seed, threshold, gain, T, S, D, DV,
                True, PAD, LATE, ADDED, PRECISION, PRECISE, DESCRIPTORS, EVEN_D, EVEN_DV,
                BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, COLUMNS, ANEW, WITH_DK, WITH_DV,
            )  # fmt: skip
        dk_tile, dv_tile = _walk_queries(
            dk_tile, dv_tile, full_begin, full_end, column, k, v, q, dout,
            strides_k, strides_v, strides_q, strides_do, statistics, b, h, h_kv, head, n,
            offset, length, left, right, scale, cap, mask_head, smt, sms, seed, threshold, gain, T, S, D, DV,
            False, PAD, LATE, ADDED, PRECISION, PRECISE, DESCRIPTORS, EVEN_D, EVEN_DV,
            BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, COLUMNS, ANEW, WITH_DK, WITH_DV,
        )  # fmt: skip
        if left is not None:
            dk_tile, dv_tile = _walk_queries(
                dk_tile, dv_tile, full_end, end, column, k, v, q, dout,
                strides_k, strides_v, strides_q, strides_do, statistics, b, h, h_kv, head, n,
                offset, length, left, right, scale, cap, mask_head, smt, sms, seed, threshold, gain, T, S, D, DV,
                True, PAD, LATE, ADDED, PRECISION, PRECISE, DESCRIPTORS, EVEN_D, EVEN_DV,
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
        strides_dv = in_elements(sdvb, sdvh, sdvs, UNIT)
        store_parts(dv, strides_dv, b, h_kv, n, S, column, DV, dv_tile, BLOCK_N, C_DV, PARTS_DV, DESCRIPTORS_OUT)
    if WITH_DK:
        dk_tile = scaled_parts(dk_tile, dk_scale, PARTS_D)
        strides_dk = in_elements(sdkb, sdkh, sdks, UNIT)
        store_parts(dk, strides_dk, b, h_kv, n, S, column, D, dk_tile, BLOCK_N, C_D, PARTS_D, DESCRIPTORS_OUT)
