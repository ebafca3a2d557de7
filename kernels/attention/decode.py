"""Attention of a few queries against a long cache of keys and values; no gradient.

    o[i] = sum_j p_ij v[j],   p_ij = softmax over j of (softcap(scale q[i] . k[j]) + mask_ij)

Legend: B sequences, H query heads, HK key heads, G = H / HK query heads share one key head, T queries, S keys, D and DV
widths of keys and values. The keys are split (flash-decoding, Dao et al. 2023) so that few sequences fill the chip: one
program walks over one share of the keys of one key head with an online softmax and leaves float32 (sum of p v, maximum,
sum of p); a second kernel adds the shares in their order, so two runs are bitwise equal. The G T query rows of a key
head are the rows of one tile: an element of the cache is read once however many heads share it.

Shares are cut from what a sequence can see (its length, the causal bound, the window), which is known on the GPU alone;
their number depends on sizes alone. So nothing waits for the GPU, and a CUDA graph serves every length of a cache.

FLOPs: 2 H T L (D + DV) per sequence of L visible keys. Traffic: HK L (D + DV) elements of cache per sequence, beside
q and o and, with more than one share, 8 H T DV bytes per share. Bound by memory up to some 300 rows of a tile.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activation import tanh
from ..device import Chip, cdiv, chip_of, dot_precision, on_device_of
from ..launch.entry import entry
from ..tile import LOG2_E
from ..tunable import Choice, bucket_of
from .mask import FAR, in_base_2, limits
from .tile import block_width, empty_like_rows

_COMBINED = 4096  # elements of the shares' sums that a program of the second kernel has in flight


@entry(do_not_specialize=["T", "S", "causal_offset", "window", "splits"])
def attention_decode_kernel(
    o_ptr,  # one share: (B, H, T, DV), any strides; more: (B HK, splits, G T, DV) float32
    max_ptr, sum_ptr,  # (B HK, splits, G T) float32; None for one share
    q_ptr, k_ptr, v_ptr,  # (B, H, T, D), (B, HK, S, D), (B, HK, S, DV), last stride 1
    mask_ptr, length_ptr, offset_ptr,  # (B, H, T, S) uint8 or floating; (B,), (B,) integers; each may be None
    strides_o, strides_q, strides_k, strides_v,  # between sequences, heads and rows
    strides_mask, stride_length, stride_offset,  # of all axes of each
    HK, G, T, S, scale, softcap, causal_offset, window, splits,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BOOL_MASK: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Program (head of keys and tile of its query rows, share): BLOCK_K covers D, BLOCK_DV covers DV.

    UNIT: the elements in which strides of keys and values are given. Where rows begin at multiples of 16 bytes, saying
    so by their form lets them be loaded 16 bytes at a time, whatever D is.
    """
    stride_ob, stride_oh, stride_ot = strides_o
    stride_qb, stride_qh, stride_qt = strides_q
    stride_kb, stride_kh, stride_ks = strides_k
    stride_vb, stride_vh, stride_vs = strides_v
    stride_mb, stride_mh, stride_mt, stride_ms = strides_mask
    tiles = tl.cdiv(G * T, BLOCK_M)
    head, tile, split = tl.program_id(0) // tiles, tl.program_id(0) % tiles, tl.program_id(1)
    b, hk = (head // HK).to(tl.int64), (head % HK).to(tl.int64)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # g T + t
    there = rows < G * T
    g, t = rows // T, rows % T
    h, t_far = hk * G + g, t.to(tl.int64)  # what strides are multiplied by
    ADDED: tl.constexpr = mask_ptr is not None and not BOOL_MASK
    offs_n, offs_d, offs_dv = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_DV)
    d_inside = (offs_d < D)[None, :] if D != BLOCK_K else tl.full((1, BLOCK_K), True, tl.int1)
    dv_inside = (offs_dv < DV)[None, :] if DV != BLOCK_DV else tl.full((1, BLOCK_DV), True, tl.int1)

    if offset_ptr is not None:
        offset_ptr += b * stride_offset
    if length_ptr is not None:
        length_ptr += b * stride_length
    offset, last = limits(causal_offset, offset_ptr, length_ptr, 0, S)
    first = 0
    if CAUSAL:
        last = tl.minimum(last, T + offset)
    elif WINDOW:
        last = tl.minimum(last, T - 1 + offset + window)
    if WINDOW:
        first = tl.maximum(offset - window + 1, 0)
    blocks = tl.cdiv(tl.maximum(last - first, 0), BLOCK_N)
    share = tl.cdiv(blocks, splits) * BLOCK_N
    begin = first + split * share
    end = tl.minimum(begin + share, last)

    q_ptrs = q_ptr + (b * stride_qb + h * stride_qh + t_far * stride_qt)[:, None] + offs_d[None, :]
    q = tl.load(q_ptrs, mask=there[:, None] & d_inside, other=0.0)
    k_ptr += (b * stride_kb + hk * stride_kh) * UNIT
    v_ptr += (b * stride_vb + hk * stride_vh) * UNIT
    at = t + offset

    top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), dtype=tl.float32)
    for start in range(begin, end, BLOCK_N):
        j = start + offs_n
        inside = j < end
        j_far = j.to(tl.int64)[:, None]  # addresses made anew take fewer registers than kept ones
        k_ptrs = k_ptr + j_far * stride_ks * UNIT + offs_d[None, :]
        k = tl.load(k_ptrs, mask=inside[:, None] & d_inside, other=0.0)
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        if SOFTCAP:
            scores = softcap * tanh(scores * scale)  # the launcher has put 1 / softcap into scale
        else:
            scores *= scale
        seen = inside[None, :]
        if CAUSAL:
            seen = seen & (j[None, :] <= at[:, None])
        if WINDOW:
            seen = seen & (j[None, :] > at[:, None] - window)
            if not CAUSAL:
                seen = seen & (j[None, :] < at[:, None] + window)
        if mask_ptr is not None:
            mask_ptrs = (
                mask_ptr
                + (b * stride_mb + h * stride_mh + t_far * stride_mt)[:, None]
                + j.to(tl.int64)[None, :] * stride_ms
            )
            mask = tl.load(mask_ptrs, mask=there[:, None] & inside[None, :], other=0)
            if BOOL_MASK:
                seen = seen & (mask != 0)
            else:
                scores += mask.to(tl.float32)
        scores = tl.where(seen, scores, float("-inf"))

        new_top = tl.maximum(top, tl.max(scores, axis=1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen nothing: no inf - inf
        shrink = tl.exp2(in_base_2(top - base, ADDED))
        p = tl.exp2(in_base_2(scores - base[:, None], ADDED))
        total = total * shrink + tl.sum(p, axis=1)
        v_ptrs = v_ptr + j_far * stride_vs * UNIT + offs_dv[None, :]
        v = tl.load(v_ptrs, mask=inside[:, None] & dv_inside, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top

    if max_ptr is None:
        o = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        o_ptrs = o_ptr + (b * stride_ob + h * stride_oh + t_far * stride_ot)[:, None] + offs_dv[None, :]
        tl.store(o_ptrs, o.to(o_ptr.dtype.element_ty), mask=there[:, None] & dv_inside)
    else:
        part = (head.to(tl.int64) * splits + split) * (G * T) + rows
        tl.store(max_ptr + part, top, mask=there)
        tl.store(sum_ptr + part, total, mask=there)
        if begin < end:  # else nobody reads them
            tl.store(o_ptr + part[:, None] * DV + offs_dv[None, :], acc, mask=there[:, None] & dv_inside)


@entry(do_not_specialize=["T", "splits"])
def attention_combine_kernel(
    o_ptr, part_ptr, max_ptr, sum_ptr,  # (B, H, T, DV), any strides; as attention_decode_kernel leaves them
    stride_ob, stride_oh, stride_ot, HK, G, T, DV, splits,
    ADDED: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One program: one row of o, its shares taken BLOCK_S at a time."""
    row = tl.program_id(0).to(tl.int64)
    rows = G * T
    head, r = row // rows, row % rows
    offs_s, offs_dv = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_DV)
    top = tl.full((), float("-inf"), dtype=tl.float32)
    total = tl.full((), 0.0, dtype=tl.float32)
    acc = tl.zeros((BLOCK_DV,), dtype=tl.float32)
    for start in range(0, splits, BLOCK_S):
        s = start + offs_s
        part = (head * splits + s) * rows + r
        tops = tl.load(max_ptr + part, mask=s < splits, other=float("-inf"))
        totals = tl.load(sum_ptr + part, mask=s < splits, other=0.0)
        written = (totals != 0.0)[:, None] & (offs_dv < DV)[None, :]
        sums = tl.load(part_ptr + part[:, None] * DV + offs_dv[None, :], mask=written, other=0.0)
        new_top = tl.maximum(top, tl.max(tops, axis=0))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink, weights = tl.exp2(in_base_2(top - base, ADDED)), tl.exp2(in_base_2(tops - base, ADDED))
        total = total * shrink + tl.sum(totals * weights, axis=0)
        acc = acc * shrink + tl.sum(sums * weights[:, None], axis=0)
        top = new_top
    o = acc / tl.where(total == 0.0, 1.0, total)
    o_ptrs = o_ptr + head // HK * stride_ob + (head % HK * G + r // T) * stride_oh + r % T * stride_ot + offs_dv
    tl.store(o_ptrs, o.to(o_ptr.dtype.element_ty), mask=offs_dv < DV)


class DecodeSettings(NamedTuple):
    """How decoding is cut up: rows and keys of a tile, shares of the keys, warps, pipeline stages."""

    BLOCK_M: int
    BLOCK_N: int
    SPLITS: int
    num_warps: int
    num_stages: int


class DecodeProblem(NamedTuple):
    """What the settings of a decoding step depend on."""

    heads: int  # of keys, in all sequences: B HK
    rows: int  # query rows for each of them: G T
    S: int
    D: int
    DV: int
    itemsize: int  # of an element, in bytes
    capped: bool  # by a softcap
    masked: bool


def decode_default(gpu: Chip, p: DecodeProblem) -> DecodeSettings:
    """Tiles of which a multiprocessor holds two, and the number of shares of the keys that takes the least time."""
    heads, rows, S, D, DV, itemsize, capped, masked = p
    width = max(block_width(D), block_width(DV))
    wide = width > 128
    partly = width > 64 and (block_width(D) > D or block_width(DV) > DV)  # telling where columns end takes registers
    most = 64 if itemsize == 2 else 16 if wide or partly else 32  # float32 is split into parts that live in registers
    block_m = next((m for m in (16, 32) if m < most and rows <= m), most)
    key = (block_width(D) + block_width(DV)) * itemsize  # bytes of one key and its value in a tile
    stages, buffers = (2, 1) if gpu.is_amd else (3, 3)
    room = gpu.shared // 2 - block_m * block_width(D) * itemsize  # of shared memory: two programs on a multiprocessor
    longest = 128 if itemsize == 2 else 64
    block_n = next((n for n in (longest, 64, 32) if n * key * buffers <= room), 16)
    scores = 1024 if masked else 2048 if capped else 4096  # of a tile; a mask has an address for each
    block_n = min(block_n, max(16, triton.next_power_of_2(S)), scores // block_m)
    blocks, programs, slots = max(cdiv(S, block_n), 1), max(heads, 1) * cdiv(rows, block_m), 2 * gpu.processors

    def time(splits):  # in blocks of keys; a program costs one more, the second kernel two
        return cdiv(programs * splits, slots) * (cdiv(blocks, splits) + 1) + (2 if splits > 1 else 0)

    splits = min(range(1, min(blocks, slots) + 1), key=time)
    warps = 8 if block_m * block_width(DV) > 64 * 128 or (itemsize == 4 and (wide or block_m == 32)) else 4
    return DecodeSettings(block_m, block_n, splits, warps, stages)


def decode_bucket(p: DecodeProblem) -> str:
    return bucket_of(p.heads, p.rows, p.S, item=p.itemsize, d=p.D, dv=p.DV, capped=p.capped, masked=p.masked)


def decode_fits(gpu: Chip, p: DecodeProblem, s: DecodeSettings) -> bool:
    """Whether a processor holds a tile, and no share of the keys is empty."""
    key = (block_width(p.D) + block_width(p.DV)) * p.itemsize
    shared = s.BLOCK_M * block_width(p.D) * p.itemsize + s.num_stages * s.BLOCK_N * key + 2048
    held = s.BLOCK_M * (s.BLOCK_N + block_width(p.DV)) // (32 * s.num_warps)
    return shared <= gpu.shared and held <= (64 if p.itemsize == 4 else 128) and cdiv(p.S, s.BLOCK_N) >= s.SPLITS


decode_choice = Choice("attention_decode", DecodeSettings, decode_bucket, decode_fits, decode_default)


def attention_decode(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, causal_offset: int | Tensor | None,
    window: int | None, softcap: float | None, key_lengths: Tensor | None, mask: Tensor | None, precision: str,
    settings: DecodeSettings | None = None,
) -> Tensor:  # fmt: skip
    """q (B, H, T, D), k (B, HK, S, D), v (B, HK, S, DV) -> o (B, H, T, DV), which lies in memory as q.

    causal: query i sees keys j <= i + causal_offset, an int, None for 0, or a (), (1,) or (B,) integer tensor on the
    GPU. window, softcap: None or numbers; without causal |i + causal_offset - j| < window. key_lengths: None or (B,)
    integers on the GPU. mask: None or broadcasts to (B, H, T, S); bool: True takes part; floating: added. precision:
    torch's float32 matmul precision.
    """
    (B, H, T, D), (_, HK, S, DV) = q.shape, v.shape
    o = empty_like_rows(q, DV)
    if o.numel() == 0:
        return o
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    G = H // HK
    gpu = chip_of(q)
    capacity = cdiv(S, 128) * 128  # a cache that grows gets its settings once in 128 steps
    capped, masked = softcap is not None, mask is not None
    problem = DecodeProblem(B * HK, G * T, capacity, D, DV, q.element_size(), capped, masked)
    settings = settings or decode_choice(gpu, problem)
    bool_mask = mask is not None and mask.dtype == torch.bool
    if mask is not None:
        mask = (mask.view(torch.uint8) if bool_mask else mask).expand(B, H, T, S)
    lengths = None if key_lengths is None else key_lengths.expand(B)
    offsets = causal_offset.reshape(-1).expand(B) if isinstance(causal_offset, torch.Tensor) else None
    offset = 0 if offsets is not None else max(-FAR.value, min(causal_offset or 0, FAR.value))
    part, tops, totals, strides = o, None, None, o.stride()[:3]
    if settings.SPLITS > 1:
        part = torch.empty(B * HK, settings.SPLITS, G * T, DV, dtype=torch.float32, device=q.device)
        tops, totals = torch.empty(2, *part.shape[:3], dtype=torch.float32, device=q.device)
    unit = 16 // q.element_size()
    unit = unit if all(stride % unit == 0 for x in (k, v) for stride in x.stride()[:3]) else 1
    added = masked and not bool_mask  # then scores are in base e, see in_base_2
    log2_e = 1.0 if added else LOG2_E.value
    scale, softcap = (scale / softcap, softcap * log2_e) if capped else (scale * log2_e, 0.0)
    with on_device_of(q):
        attention_decode_kernel[(B * HK * cdiv(G * T, settings.BLOCK_M), settings.SPLITS)](
            part, tops, totals, q, k, v, mask, lengths, offsets,
            strides, q.stride()[:3], *(tuple(stride // unit for stride in x.stride()[:3]) for x in (k, v)),
            (0, 0, 0, 0) if mask is None else mask.stride(),
            0 if lengths is None else lengths.stride(0), 0 if offsets is None else offsets.stride(0),
            HK, G, T, S, scale, softcap, offset, min(window or 0, FAR.value), settings.SPLITS,
            causal, window is not None, capped, bool_mask, D, DV, unit,
            dot_precision(gpu, precision), settings.BLOCK_M, settings.BLOCK_N, block_width(D), block_width(DV),
            num_warps=settings.num_warps, num_stages=settings.num_stages,
        )  # fmt: skip
        if settings.SPLITS > 1:
            block_s = min(triton.next_power_of_2(settings.SPLITS), max(_COMBINED // block_width(DV), 1))
            attention_combine_kernel[(B * H * T,)](
                o, part, tops, totals, *strides, HK, G, T, DV, settings.SPLITS, added,
                block_s, block_width(DV), num_warps=4,
            )  # fmt: skip
    return o
