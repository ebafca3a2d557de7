"""Attention's backward: weights are computed again, tile by tile; no atomics, so two runs are bitwise equal.

    p  = exp2(s - lse)                       delta = row sums of dout * out
    dv = p^T dout                            dp = dout v^T
    ds = p (dp - delta), times the slope of the softcap
    dk = ds^T q scale                        dq = ds k scale

One program per tile of keys walks over the queries (dk, dv), over all query heads that share the keys; one per tile of
queries walks over the keys (dq). Dropout keeps p' = p kept / (1 - P) in dv and dp' = dp kept / (1 - P) in ds.
"""

import torch
import triton.language as tl
from torch import Tensor

from ..device import cdiv, chip_of, dot_precision, on_device_of
from ..launch.entry import entry
from .backward_kv import attention_backward_kv_kernel
from .backward_q import attention_backward_q_kernel
from .forward import heads_at_once
from .mask import Band
from .settings import AttentionProblem, BackwardSettings, backward_default, burden_of, keys_choice, queries_choice
from .tile import (
    Scoring,
    block_width,
    described,
    descriptor,
    empty_like_rows,
    head_statistics,
    load_rows,
    result_programs,
    strides_of,
)


@entry(do_not_specialize=["heads", "T"])
def attention_statistics_kernel(
    dout, out,  # (B, H, T, DV)
    lse_ptr, statistics_ptr,  # (B, H, T), or (2, B, H, T) where ADDED; see ``attention_statistics``
    strides_do, strides_o,  # between sequences, heads and rows
    heads, H, T,  # heads: B H
    PAD: tl.constexpr, DV: tl.constexpr, ADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One program: the statistics of BLOCK_M queries of one head, counted with the padding after the last."""
    padded = (tl.cdiv(T, PAD) + 1) * PAD
    tiles = tl.cdiv(padded, BLOCK_M)
    head, m = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BLOCK_M
    b, h = head // H, head % H
    EVEN: tl.constexpr = DV == BLOCK_DV
    dout_tile = load_rows(dout, strides_do, b, h, m, T, DV, BLOCK_M, BLOCK_DV, False, EVEN, True)
    out_tile = load_rows(out, strides_o, b, h, m, T, DV, BLOCK_M, BLOCK_DV, False, EVEN, True)
    rows = m + tl.arange(0, BLOCK_M)
    delta = tl.sum(dout_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    lse_ptr += head.to(tl.int64) * T
    lse = tl.load(lse_ptr + rows, mask=rows < T, other=float("inf"))
    nothing = lse == float("-inf")
    lse = tl.where(nothing, float("inf"), lse)
    statistics_ptr = head_statistics(statistics_ptr, head, T, PAD, ADDED)
    statistics_ptr += rows + ((rows & -PAD) * 2 if ADDED else rows & -PAD)
    tl.store(statistics_ptr, lse, mask=rows < padded)
    tl.store(statistics_ptr + PAD, delta, mask=rows < padded)
    if ADDED:
        log_total = tl.load(lse_ptr + tl.cast(heads, tl.int64) * T + rows, mask=rows < T, other=0.0)
        tl.store(statistics_ptr + 2 * PAD, tl.where(nothing, 0.0, log_total), mask=rows < padded)


def attention_statistics(dout: Tensor, out: Tensor, lse: Tensor, pad: int) -> Tensor:
    """What the backward's loops read of each query: float32 (B, H, blocks, 2 or 3, pad).

    A block is ``pad`` queries; there is one more than T fills, so that no loop has to look whether a query is there.
    The first number of a query is lse, infinite where it sees nothing or is not there, so that its weights come out 0.
    The second is delta, the sum of dout * out over its row. Where lse comes in two parts, the first number is the
    greatest score, and a third is the logarithm of the sum. The compiler knows the distance between the numbers, so
    that one address serves all.

    dout, out: (B, H, T, DV), last stride 1. pad: the most queries of a tile, a power of two.
    """
    B, H, T, DV = out.shape
    blocks = cdiv(T, pad) + 1
    added = lse.dim() == 4
    statistics = torch.empty(B, H, blocks, 2 + added, pad, dtype=torch.float32, device=out.device)
    width = block_width(DV)
    block = max(16, 4096 // width)
    with on_device_of(out):
        attention_statistics_kernel[(B * H * cdiv(blocks * pad, block),)](
            dout, out, lse, statistics, dout.stride()[:3], out.stride()[:3], B * H, H, T, pad, DV, added,
            block, width, num_warps=4,
        )  # fmt: skip
    return statistics


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, band: Band, scoring: Scoring,
    precision: str, needed: tuple[bool, bool] = (True, True), settings: BackwardSettings | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dout, out (B, H, T, DV), lse and the forward's arguments -> dq, dk, dv, or None where not needed.

    needed: whether dq is, whether dk and dv are.
    """
    (B, H, T, D), (_, HK, S, DV) = q.shape, v.shape
    dq = empty_like_rows(q, D) if needed[0] else None
    dk, dv = (empty_like_rows(k, D), empty_like_rows(v, DV)) if needed[1] else (None, None)
    if B * H * T * S * DV == 0 or not any(needed):
        return tuple(t if t is None else t.zero_() for t in (dq, dk, dv))
    gpu, scoring = chip_of(q), scoring.aligned()
    descriptors = gpu.has_descriptors and q.element_size() == 2 and all(described(t) for t in (q, k, v, dout))
    block_d, block_dv = block_width(D), block_width(DV)
    burden = burden_of(scoring, band.lengths is not None, H != HK or band.left is not None)
    dot = dot_precision(gpu, precision)

    def problem(heads):
        return AttentionProblem.of(q, k, v, heads, band, descriptors, burden, dot, max(block_d, block_dv))

    def operands(settings, *results):
        """Results, then dout, q, k, v, as kernels take them; their strides and its unit; are results descriptors."""
        blocks = (settings.BLOCK_M, settings.BLOCK_M, settings.BLOCK_N, settings.BLOCK_N)
        described_results = descriptors and all(described(t) for t in results if t is not None)
        rows = settings.BLOCK_N if len(results) == 2 else settings.BLOCK_M
        tensors = [descriptor(t, rows) if described_results and t is not None else t for t in results]
        tensors += [
            descriptor(t, block) if descriptors else t for t, block in zip((dout, q, k, v), blocks, strict=True)
        ]
        by_descriptor = *(described_results,) * len(results), *(descriptors,) * 4
        strides, unit = strides_of((*results, dout, q, k, v), by_descriptor)
        return tensors, strides, unit, described_results

    def launch(kernel, programs, settings, at_once, *results):
        columns = max(result_programs(t.shape[3], settings.COLUMNS) for t in results if t is not None)
        tensors, strides, unit, described_results = operands(settings, *results)
        kernel[(programs, columns)](
            *tensors, statistics, strides,
            band.offsets, band.lengths, band.offset, band.left, band.right, *scoring.arguments(), scoring.scale,
            B, H, T, S, at_once, H // HK, D, DV, unit, pad,
            scoring.scaled_late, S % settings.BLOCK_N == 0, dot, scoring.precise(q.dtype),
            descriptors, described_results, settings.BLOCK_M, settings.BLOCK_N, block_d, block_dv, settings.COLUMNS,
            num_warps=settings.num_warps, num_stages=settings.num_stages,
        )  # fmt: skip

    keys = (settings.keys if settings else keys_choice(gpu, problem(B * HK))) if needed[1] else None
    queries = (settings.queries if settings else queries_choice(gpu, problem(B * H))) if needed[0] else None
    pad = max(s.BLOCK_M for s in (keys, queries) if s is not None)
    with on_device_of(q):
        statistics = attention_statistics(dout, out, lse, pad)
        if keys is not None:
            at_once = min(B * HK, heads_at_once(1, 1, T * (H // HK), D, DV, q.element_size()))
            apart = (settings or backward_default(gpu, problem(B * HK))).apart
            programs = B * HK * cdiv(S, keys.BLOCK_N)
            for results in ((dk, None), (None, dv)) if apart else ((dk, dv),):
                launch(attention_backward_kv_kernel, programs, keys, at_once, *results)
        if queries is not None:
            at_once = min(B * H, heads_at_once(H, HK, S, D, DV, q.element_size()))
            programs = B * H * cdiv(T, queries.BLOCK_M)
            launch(attention_backward_q_kernel, programs, queries, at_once, dq)
    return dq, dk, dv
