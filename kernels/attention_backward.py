"""Attention's backward: weights are computed again, tile by tile; no atomics, so two runs are bitwise equal.

    p  = exp2(s - lse)                       delta = row sums of dout * out
    dv = p^T dout                            dp = dout v^T
    ds = p (dp - delta), times the slope of the softcap
    dk = ds^T q scale                        dq = ds k scale

One program per tile of keys walks over the queries (dk, dv), over all query heads that share the keys; one per tile of
queries walks over the keys (dq). Dropout keeps p' = p kept / (1 - P) in dv and dp' = dp kept / (1 - P) in ds.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .attention_forward import TileSettings, heads_at_once, ordered_tile
from .attention_mask import Band, kept, key_blocks, limits, query_blocks
from .attention_tile import (
    Scoring,
    add_products,
    block_width,
    described,
    descriptor,
    empty_like_rows,
    load_rows,
    part_count,
    part_width,
    products_of_rows,
    result_programs,
    result_width,
    scaled_parts,
    scores,
    store_parts,
    without_padding,
    zero_parts,
)  # fmt: skip
from .launch import Chip, cdiv, chip, dot_precision, on_device_of


@triton.jit(do_not_specialize=["T"])
def attention_delta_kernel(
    dout, out, delta_ptr, sdb, sdh, sdt, sob, soh, sot, H, T,
    DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Row sums of dout * out, (B, H, T)."""
    tiles = tl.cdiv(T, BLOCK_M)
    head, m = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BLOCK_M
    b, h = head // H, head % H
    EVEN: tl.constexpr = DV == BLOCK_DV
    dout_tile = load_rows(dout, (sdb, sdh, sdt), b, h, m, T, DV, BLOCK_M, BLOCK_DV, False, EVEN, True)
    out_tile = load_rows(out, (sob, soh, sot), b, h, m, T, DV, BLOCK_M, BLOCK_DV, False, EVEN, True)
    rows = m + tl.arange(0, BLOCK_M)
    sums = tl.sum(dout_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    tl.store(delta_ptr + head.to(tl.int64) * T + rows, sums, mask=rows < T)


@triton.jit
def _load_lse(lse_ptr, rows, T):
    """A query that sees nothing, or is past T, gets infinity: its weights come out 0."""
    lse = tl.load(lse_ptr + rows, mask=rows < T, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def _walk_queries(
    dk, dv, begin, end, column, k, v, q, dout, strides_k, strides_v, strides_q, strides_do, lse_ptr, delta_ptr,
    b, h, h_kv, head, n, offset, length, left, right, scale, cap, mask_ptr, stride_mt, stride_ms,
    seed, threshold, gain, T, S, D, DV,
    MASKED: tl.constexpr, LATE: tl.constexpr, PRECISION: tl.constexpr, PRECISE: tl.constexpr,
    DESCRIPTORS: tl.constexpr, EVEN_D: tl.constexpr, EVEN_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The queries of one head in [begin, end); tiles lie (keys, queries). k, v: tiles; pointers with COLUMNS."""
    C_D: tl.constexpr = part_width(BLOCK_D, COLUMNS)
    C_DV: tl.constexpr = part_width(BLOCK_DV, COLUMNS)
    PARTS_D: tl.constexpr = part_count(D, COLUMNS)
    PARTS_DV: tl.constexpr = part_count(DV, COLUMNS)
    keys = (n + tl.arange(0, BLOCK_N))[:, None]
    for m in range(begin, end, BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        if COLUMNS:
            products = products_of_rows(
                k, strides_k, h_kv, n, length, q, strides_q, h, m, T, b, D,
                BLOCK_N, BLOCK_M, COLUMNS, True, True, PRECISION,
            )  # fmt: skip
        else:
            q_tile = load_rows(q, strides_q, b, h, m, T, D, BLOCK_M, BLOCK_D, DESCRIPTORS, EVEN_D, True)
            products = tl.dot(k, q_tile.T, input_precision=PRECISION)
        s, slope = scores(
            products, scale, cap, rows[None, :], keys, offset, length, left, right, mask_ptr, stride_mt, stride_ms,
            T, S, not LATE, MASKED, PRECISE,
        )  # fmt: skip
        lse = _load_lse(lse_ptr, rows, T)
        if LATE:
            p = tl.exp2(s * scale - lse[None, :])
        else:
            p = tl.exp2(s - lse[None, :])
        if not COLUMNS:
            dout_tile = load_rows(dout, strides_do, b, h, m, T, DV, BLOCK_M, BLOCK_DV, DESCRIPTORS, EVEN_DV, True)
            dp = tl.dot(v, dout_tile.T, input_precision=PRECISION)
        weights = p
        if seed is not None:
            keep = kept(seed, head, m, n, threshold, BLOCK_M, BLOCK_N).T
            weights = tl.where(keep, p, 0.0)
        if COLUMNS:
            if dv is not None:
                dv = add_products(
                    dv, weights, dout, strides_do, b, h, m, T, column, DV,
                    BLOCK_M, C_DV, PARTS_DV, EVEN_DV, True, PRECISION,
                )  # fmt: skip
            if dk is not None:
                dp = products_of_rows(
                    v, strides_v, h_kv, n, length, dout, strides_do, h, m, T, b, DV,
                    BLOCK_N, BLOCK_M, COLUMNS, True, True, PRECISION,
                )  # fmt: skip
        else:
            dv = (tl.dot(weights.to(dout_tile.dtype), dout_tile, dv[0], input_precision=PRECISION),)
        if dk is not None:
            if seed is not None:
                dp = tl.where(keep, dp * gain, 0.0)
            delta = tl.load(delta_ptr + rows, mask=rows < T, other=0.0)
            ds = p * (dp - delta[None, :])
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


@triton.jit(do_not_specialize=["offset", "left", "right", "threshold", "T", "S", "heads_at_once"])
def attention_backward_kv_kernel(
    dk, dv, dout, q, k, v, lse_ptr, delta_ptr,  # dk or dv may be None
    sdkb, sdkh, sdks, sdvb, sdvh, sdvs, sdob, sdoh, sdot, sqb, sqh, sqt, skb, skh, sks, svb, svh, svs,
    offsets_ptr, lengths_ptr, offset, left, right,
    scale, cap, mask_ptr, smb, smh, smt, sms, seed_ptr, threshold, gain, dk_scale,
    B, H, T, S, heads_at_once,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
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
    EVEN_D: tl.constexpr = D == BLOCK_D
    EVEN_DV: tl.constexpr = DV == BLOCK_DV
    strides_q, strides_do = (sqb, sqh, sqt), (sdob, sdoh, sdot)
    strides_k, strides_v = (skb, skh, sks), (svb, svh, svs)
    if not COLUMNS:
        k = load_rows(k, strides_k, b, h_kv, n, length, D, BLOCK_N, BLOCK_D, DESCRIPTORS, EVEN_D, True)
        v = load_rows(v, strides_v, b, h_kv, n, length, DV, BLOCK_N, BLOCK_DV, DESCRIPTORS, EVEN_DV, True)
        if LENGTHS and DESCRIPTORS:
            k = without_padding(k, n, length, BLOCK_N)
            v = without_padding(v, n, length, BLOCK_N)
    C_D: tl.constexpr = part_width(BLOCK_D, COLUMNS)
    C_DV: tl.constexpr = part_width(BLOCK_DV, COLUMNS)
    PARTS_D: tl.constexpr = part_count(D, COLUMNS)
    PARTS_DV: tl.constexpr = part_count(DV, COLUMNS)
    column = 0
    if COLUMNS:
        column = tl.program_id(1) * result_width(BLOCK_D if dk is not None else BLOCK_DV, COLUMNS)
    dk_tile, dv_tile = None, None
    if dk is not None:
        dk_tile = zero_parts(BLOCK_N, C_D, PARTS_D)
    if dv is not None:
        dv_tile = zero_parts(BLOCK_N, C_DV, PARTS_DV)
    begin, full_begin, full_end, end = query_blocks(n, BLOCK_N, offset, length, left, right, T, BLOCK_M)
    for g in range(GROUP):
        h = h_kv * GROUP + g
        head = b * H + h
        rows = head.to(tl.int64) * T
        mask_head = None
        if mask_ptr is not None:
            mask_head = mask_ptr + b.to(tl.int64) * smb + h.to(tl.int64) * smh
        if right is not None or LENGTHS or not EVEN_S:
            dk_tile, dv_tile = _walk_queries(
                dk_tile, dv_tile, begin, tl.minimum(full_begin, end), column, k, v, q, dout,
                strides_k, strides_v, strides_q, strides_do, lse_ptr + rows, delta_ptr + rows, b, h, h_kv, head, n,
                offset, length, left, right, scale, cap, mask_head, smt, sms, seed, threshold, gain, T, S, D, DV,
                True, LATE, PRECISION, PRECISE, DESCRIPTORS, EVEN_D, EVEN_DV,
                BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, COLUMNS,
            )  # fmt: skip
        dk_tile, dv_tile = _walk_queries(
            dk_tile, dv_tile, full_begin, tl.minimum(full_end, end), column, k, v, q, dout,
            strides_k, strides_v, strides_q, strides_do, lse_ptr + rows, delta_ptr + rows, b, h, h_kv, head, n,
            offset, length, left, right, scale, cap, mask_head, smt, sms, seed, threshold, gain, T, S, D, DV,
            False, LATE, PRECISION, PRECISE, DESCRIPTORS, EVEN_D, EVEN_DV,
            BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, COLUMNS,
        )  # fmt: skip
        if left is not None:
            dk_tile, dv_tile = _walk_queries(
                dk_tile, dv_tile, full_end, end, column, k, v, q, dout,
                strides_k, strides_v, strides_q, strides_do, lse_ptr + rows, delta_ptr + rows, b, h, h_kv, head, n,
                offset, length, left, right, scale, cap, mask_head, smt, sms, seed, threshold, gain, T, S, D, DV,
                True, LATE, PRECISION, PRECISE, DESCRIPTORS, EVEN_D, EVEN_DV,
                BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, COLUMNS,
            )  # fmt: skip
    if dv is not None:
        if seed_ptr is not None:
            dv_tile = scaled_parts(dv_tile, gain, PARTS_DV)
        strides_dv = (sdvb, sdvh, sdvs)
        store_parts(dv, strides_dv, b, h_kv, n, S, column, DV, dv_tile, BLOCK_N, C_DV, PARTS_DV, DESCRIPTORS_OUT)
    if dk is not None:
        dk_tile = scaled_parts(dk_tile, dk_scale, PARTS_D)
        strides_dk = (sdkb, sdkh, sdks)
        store_parts(dk, strides_dk, b, h_kv, n, S, column, D, dk_tile, BLOCK_N, C_D, PARTS_D, DESCRIPTORS_OUT)


@triton.jit
def _walk_keys(
    dq, begin, end, column, q, dout, lse, delta, k, v, strides_q, strides_do, strides_k, strides_v, b, h, h_kv, head, m,
    offset, length, left, right, scale, cap, mask_ptr, stride_mt, stride_ms, seed, threshold, gain, T, S, D, DV,
    MASKED: tl.constexpr, LENGTHS: tl.constexpr, LATE: tl.constexpr, PRECISION: tl.constexpr, PRECISE: tl.constexpr,
    DESCRIPTORS: tl.constexpr, EVEN_D: tl.constexpr, EVEN_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The keys in [begin, end). q, dout: tiles; pointers with COLUMNS."""
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
            products, scale, cap, queries, keys, offset, length, left, right, mask_ptr, stride_mt, stride_ms, T, S,
            not LATE, MASKED, PRECISE,
        )  # fmt: skip
        if LATE:
            p = tl.exp2(s * scale - lse[:, None])
        else:
            p = tl.exp2(s - lse[:, None])
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


@triton.jit(do_not_specialize=["offset", "left", "right", "threshold", "T", "S", "heads_at_once"])
def attention_backward_q_kernel(
    dq, dout, q, k, v, lse_ptr, delta_ptr,
    sdqb, sdqh, sdqt, sdob, sdoh, sdot, sqb, sqh, sqt, skb, skh, sks, svb, svh, svs,
    offsets_ptr, lengths_ptr, offset, left, right,
    scale, cap, mask_ptr, smb, smh, smt, sms, seed_ptr, threshold, gain, dq_scale,
    B, H, T, S, heads_at_once,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    LATE: tl.constexpr, EVEN_S: tl.constexpr, PRECISION: tl.constexpr, PRECISE: tl.constexpr,
    DESCRIPTORS: tl.constexpr, DESCRIPTORS_OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tile, head = ordered_tile(tl.program_id(0), tl.cdiv(T, BLOCK_M), B * H, right is not None, heads_at_once)
    b, h, m = head // H, head % H, tile * BLOCK_M
    offset, length = limits(offset, offsets_ptr, lengths_ptr, b, S)
    seed = None
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    if mask_ptr is not None:
        mask_ptr += b.to(tl.int64) * smb + h.to(tl.int64) * smh

    LENGTHS: tl.constexpr = lengths_ptr is not None
    EVEN_D: tl.constexpr = D == BLOCK_D
    EVEN_DV: tl.constexpr = DV == BLOCK_DV
    strides_q, strides_do = (sqb, sqh, sqt), (sdob, sdoh, sdot)
    strides_k, strides_v = (skb, skh, sks), (svb, svh, svs)
    rows = m + tl.arange(0, BLOCK_M)
    if not COLUMNS:
        q = load_rows(q, strides_q, b, h, m, T, D, BLOCK_M, BLOCK_D, DESCRIPTORS, EVEN_D, True)
        dout = load_rows(dout, strides_do, b, h, m, T, DV, BLOCK_M, BLOCK_DV, DESCRIPTORS, EVEN_DV, True)
    lse = _load_lse(lse_ptr + head.to(tl.int64) * T, rows, T)
    delta = tl.load(delta_ptr + head.to(tl.int64) * T + rows, mask=rows < T, other=0.0)
    BLOCK_C: tl.constexpr = part_width(BLOCK_D, COLUMNS)
    PARTS: tl.constexpr = part_count(D, COLUMNS)
    column = 0
    if COLUMNS:
        column = tl.program_id(1) * result_width(BLOCK_D, COLUMNS)
    dq_tile = zero_parts(BLOCK_M, BLOCK_C, PARTS)
    begin, full_begin, full_end, end = key_blocks(
        m, tl.minimum(m + BLOCK_M, T) - 1, offset, length, left, right, BLOCK_N
    )
    if left is not None:
        dq_tile = _walk_keys(
            dq_tile, begin, tl.minimum(full_begin, end), column, q, dout, lse, delta, k, v,
            strides_q, strides_do, strides_k, strides_v,
            b, h, h // GROUP, head, m, offset, length, left, right, scale, cap, mask_ptr, smt, sms,
            seed, threshold, gain, T, S, D, DV, True, LENGTHS, LATE, PRECISION, PRECISE,
            DESCRIPTORS, EVEN_D, EVEN_DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, COLUMNS,
        )  # fmt: skip
    dq_tile = _walk_keys(
        dq_tile, full_begin, full_end, column, q, dout, lse, delta, k, v, strides_q, strides_do, strides_k, strides_v,
        b, h, h // GROUP, head, m, offset, length, left, right, scale, cap, mask_ptr, smt, sms,
        seed, threshold, gain, T, S, D, DV, False, LENGTHS, LATE, PRECISION, PRECISE,
        DESCRIPTORS, EVEN_D, EVEN_DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, COLUMNS,
    )  # fmt: skip
    if right is not None or LENGTHS or not EVEN_S:
        dq_tile = _walk_keys(
            dq_tile, full_end, end, column, q, dout, lse, delta, k, v, strides_q, strides_do, strides_k, strides_v,
            b, h, h // GROUP, head, m, offset, length, left, right, scale, cap, mask_ptr, smt, sms,
            seed, threshold, gain, T, S, D, DV, True, LENGTHS, LATE, PRECISION, PRECISE,
            DESCRIPTORS, EVEN_D, EVEN_DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, COLUMNS,
        )  # fmt: skip
    dq_tile = scaled_parts(dq_tile, dq_scale, PARTS)
    store_parts(dq, (sdqb, sdqh, sdqt), b, h, m, T, column, D, dq_tile, BLOCK_M, BLOCK_C, PARTS, DESCRIPTORS_OUT)


class BackwardSettings(NamedTuple):
    """Tiles of the two backward kernels."""

    keys: TileSettings  # walks over queries
    queries: TileSettings  # walks over keys
    apart: bool = False  # dk and dv by programs of their own


def backward_settings(gpu: Chip, itemsize: int, width: int, descriptors: bool, simple: bool) -> BackwardSettings:
    """width: the larger of the two head dimensions, rounded up to a power of two. simple: causality at most, and no
    grouped heads: that leaves registers for a wider step. In float32: no softcap, attn_mask or dropout."""
    if itemsize == 4:
        block_n = (32 if width > 64 else 64) // (1 if simple else 2)
        return BackwardSettings(TileSettings(32, 64, 4, 1, 32), TileSettings(64, block_n, 4, 1, 32), apart=width > 64)
    if descriptors:
        tiles = {
            128: ((64 if simple else 32, 128, 8, 2), (128, 64, 8, 2)),
            256: ((16, 64, 8, 2), (64, 32, 8, 2)),
        }
        small = ((64, 64, 4, 2), (128, 64, 4 if simple else 8, 2))
    else:
        tiles = {128: ((32, 128, 8, 2), (128, 32, 8, 2)), 256: ((32, 64, 8, 1), (64, 32, 8, 1))}
        small = ((64, 64, 4, 2), (64, 64, 4, 2))
    return BackwardSettings(*(TileSettings(*tile) for tile in tiles.get(width, small)))


def attention_delta(dout, out):
    """(B, H, T, DV) twice, last stride 1 -> row sums of their product, float32 (B, H, T)."""
    B, H, T, DV = out.shape
    delta = torch.empty(B, H, T, dtype=torch.float32, device=out.device)
    width = block_width(DV)
    block = max(16, 4096 // width)
    with on_device_of(out):
        attention_delta_kernel[(B * H * cdiv(T, block),)](
            dout, out, delta, *dout.stride()[:3], *out.stride()[:3], H, T, DV, block, width, num_warps=4
        )
    return delta


def attention_backward(
    dout, q, k, v, out, lse, band: Band, scoring: Scoring, precision, needed=(True, True),
    settings: BackwardSettings | None = None,
):  # fmt: skip
    """dout, out (B, H, T, DV), lse (B, H, T) and the forward's arguments -> dq, dk, dv, or None where not needed.

    needed: whether dq is, whether dk and dv are.
    """
    (B, H, T, D), (_, HK, S, DV) = q.shape, v.shape
    dq = empty_like_rows(q, D) if needed[0] else None
    dk, dv = (empty_like_rows(k, D), empty_like_rows(v, DV)) if needed[1] else (None, None)
    if B * H * T * S * DV == 0:
        return tuple(t if t is None else t.zero_() for t in (dq, dk, dv))
    gpu = chip()
    descriptors = gpu.has_descriptors and q.element_size() == 2 and all(described(t) for t in (q, k, v, dout))
    block_d, block_dv = block_width(D), block_width(DV)
    causal_at_most = H == HK and band.left is None and band.lengths is None
    simple = scoring.simple and (q.element_size() == 4 or causal_at_most)
    s = settings or backward_settings(gpu, q.element_size(), max(block_d, block_dv), descriptors, simple)
    delta = attention_delta(dout, out)

    def operands(tile, *results):
        """Results, then dout, q, k, v, as the kernel takes them; whether results are descriptors."""
        blocks = (tile.BLOCK_M, tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_N)
        described_results = descriptors and all(map(described, results))
        rows = tile.BLOCK_N if len(results) == 2 else tile.BLOCK_M
        tensors = [descriptor(t, rows) if described_results else t for t in results]
        tensors += [
            descriptor(t, block) if descriptors else t for t, block in zip((dout, q, k, v), blocks, strict=True)
        ]
        strides = [stride for t in (*results, dout, q, k, v) for stride in ((0, 0, 0) if t is None else t.stride()[:3])]
        return tensors, strides, described_results

    def launch(kernel, programs, tile, at_once, *results):
        columns = max(result_programs(t.shape[3], tile.COLUMNS) for t in results if t is not None)
        tensors, strides, described_results = operands(tile, *results)
        kernel[(programs, columns)](
            *tensors, lse, delta, *strides,
            band.offsets, band.lengths, band.offset, band.left, band.right, *scoring.arguments(), scoring.scale,
            B, H, T, S, at_once, H // HK, D, DV,
            scoring.scaled_late, S % tile.BLOCK_N == 0, dot_precision(gpu, precision), q.dtype == torch.float32,
            descriptors, described_results, tile.BLOCK_M, tile.BLOCK_N, block_d, block_dv, tile.COLUMNS,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip

    with on_device_of(q):
        if needed[1]:
            at_once = min(B * HK, heads_at_once(1, 1, T * (H // HK), D, DV, q.element_size()))
            programs = B * HK * cdiv(S, s.keys.BLOCK_N)
            for results in ((dk, None), (None, dv)) if s.apart else ((dk, dv),):
                launch(attention_backward_kv_kernel, programs, s.keys, at_once, *results)
        if needed[0]:
            at_once = min(B * H, heads_at_once(H, HK, S, D, DV, q.element_size()))
            programs = B * H * cdiv(T, s.queries.BLOCK_M)
            launch(attention_backward_q_kernel, programs, s.queries, at_once, dq)
    return dq, dk, dv
