"""The gradient before a linear layer's activation, written once, where the products would make it tile by tile.

    g  = dy * activation'(z)        db = sum over rows of g

A product that makes g on its way must wait in every step until g is written to shared memory. A product whose operands
arrive there from memory does not wait. With g in memory both products of the backward are of that second kind. The
price is that g is written: M N elements more of memory. The products then read g in place of dy and what was saved.

Traffic: 3 M N elements. Each program walks down its share of the rows and sums what it writes; a second kernel adds
the shares of db in a fixed order: two runs are bitwise equal.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .entry import entry
from .launch import LAUNCH_SECONDS, Chip, Product, cdiv, chip_of, estimate, estimated_settings, on_device_of
from .partials import add_rows
from .tile import backpropagate
from .tunable import Bucket, Variants

_TILE, _WARPS, _STAGES = 2048, 4, 3  # elements of a tile: 16 a thread
_NARROW = 1024  # the same where rows do not start on 16-byte boundaries: addresses then take a register each
_BESIDE = 4  # programs for each processor


class Activated(NamedTuple):
    """The backward of a layer with an activation."""

    M: int
    N: int
    K: int
    itemsize: int
    passes: int = 1  # see launch.Product
    input: bool = True  # x needs a gradient
    weight: bool = True  # so does w
    sums: bool = True  # so does the bias


def _possible(gpu: Chip, p: Activated) -> bool:
    return min(p.M, p.N, p.K) > 0


@functools.lru_cache(maxsize=4096)
def estimated_way(gpu: Chip, p: Activated) -> str:
    """The way with the smaller sum of estimated times."""

    def products(fused: bool) -> float:
        dx = Product(p.M, p.K, p.N, p.itemsize, p.passes, gpu.has_descriptors, fused=fused)
        dw = dx._replace(M=p.N, K=p.M)
        return sum(
            estimate(gpu, product, estimated_settings(gpu, product))
            for product, needed in ((dx, p.input), (dw, p.weight))
            if needed
        )

    moved = 3 * p.M * p.N * p.itemsize / (0.9 * gpu.bandwidth * 1e12)
    pass_over = moved + LAUNCH_SECONDS * (2 if p.sums else 1)
    return "prepass" if _possible(gpu, p) and products(False) + pass_over < products(True) else "fused"


backward_choice = Variants(
    "linear_backward",
    lambda p: Bucket.of(
        p.M, p.N, p.K, item=p.itemsize, passes=p.passes, input=p.input, weight=p.weight, sums=p.sums
    ),
    {"fused": lambda gpu, p: True, "prepass": _possible},
    estimated_way,
    reach=1,
)  # fmt: skip


@entry
def _prepass_kernel(
    g_ptr, part_ptr, dy_ptr, saved_ptr,  # g (M, N) contiguous; part (programs, N) float32 or None
    stride_dm, stride_dn, stride_sm, stride_sn, M, N, rows,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (i, j): column block j of the i-th share of the rows."""
    first = tl.program_id(0) * rows
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    wide = col.to(tl.int64)[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for m in tl.range(first, tl.minimum(first + rows, M), BLOCK_M, num_stages=STAGES):
        row = m + tl.arange(0, BLOCK_M)
        inside = (row < M)[:, None] & (col < N)[None, :]
        long = row.to(tl.int64)[:, None]
        dy = tl.load(dy_ptr + long * stride_dm + wide * stride_dn, mask=inside, other=0.0)
        saved = tl.load(saved_ptr + long * stride_sm + wide * stride_sn, mask=inside, other=0.0)
        g = backpropagate(dy.to(tl.float32), saved.to(tl.float32), ACTIVATION).to(g_ptr.dtype.element_ty)
        tl.store(g_ptr + long * N + wide, g, mask=inside)
        sums += g.to(tl.float32)
    if part_ptr is not None:
        tl.store(part_ptr + tl.program_id(0).to(tl.int64) * N + col, tl.sum(sums, axis=0), mask=col < N)


def prepass(dy, saved, activation, sums_dtype):
    """dy, saved (M, N), any strides -> g (M, N) contiguous, its sums over rows (N,) or None where sums_dtype is."""
    M, N = dy.shape
    block_n = min(256, max(16, triton.next_power_of_2(N)))
    wide = N * dy.element_size() % 16 == 0
    block_m, columns = (_TILE if wide else _NARROW) // block_n, cdiv(N, block_n)
    shares = max(1, min(cdiv(M, block_m), _BESIDE * chip_of(dy).processors // columns))
    rows = cdiv(cdiv(M, block_m), shares) * block_m
    shares = cdiv(M, rows)
    g = torch.empty(M, N, dtype=dy.dtype, device=dy.device)
    part = sums = None
    if sums_dtype is not None:
        sums = torch.empty(N, dtype=sums_dtype, device=dy.device)
        part = torch.empty(shares, N, dtype=torch.float32, device=dy.device)
    with on_device_of(dy):
        _prepass_kernel[(shares, columns)](
            g, part, dy, saved, *dy.stride(), *saved.stride(), M, N, rows,
            activation, block_m, block_n, _STAGES, num_warps=_WARPS,
        )  # fmt: skip
    if part is not None:
        add_rows(part, sums)
    return g, sums
