"""The gradient before an activation, written once, where products would make it tile by tile.

    g  = dy * activation'(z)        db = sum over rows of g

A product that makes g on its way must wait in every step until g is written to shared memory. A product whose operands
arrive there from memory does not wait. With g in memory both products of the backward are of that second kind. The
price is that g is written: M N elements more of memory. The products then read g in place of dy and what was saved.

A convolution's rows are its pixels. Its products meet each of them once for every tap, and would make g as often.

Traffic: 3 M N elements. Each program walks down its share of the rows and sums what it writes; a second kernel adds
the shares of db in a fixed order: two runs are bitwise equal.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import backpropagate
from .device import cdiv, chip_of, on_device_of
from .launch.entry import entry
from .partials import add_rows

_TILE, _WARPS, _STAGES = 2048, 4, 3  # elements of a tile: 16 a thread
_NARROW = 1024  # the same where rows do not start on 16-byte boundaries: addresses then take a register each
_BESIDE = 4  # programs for each processor


@entry
def activation_prepass_kernel(
    g_ptr, part_ptr, dy_ptr, saved_ptr,  # g (M, N) contiguous or None; part (programs, N) float32 or None
    stride_di, stride_dm, stride_dn, stride_si, stride_sm, stride_sn, M, N, rows,
    pixels,  # rows of an image; None: all rows are of one
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
        if pixels is None:
            from_dy, from_saved = long * stride_dm, long * stride_sm
        else:
            image = (row // pixels).to(tl.int64)[:, None]
            pixel = long - image * pixels
            from_dy = image * stride_di + pixel * stride_dm
            from_saved = image * stride_si + pixel * stride_sm
        g = tl.load(dy_ptr + from_dy + wide * stride_dn, mask=inside, other=0.0)
        if saved_ptr is not None:
            saved = tl.load(saved_ptr + from_saved + wide * stride_sn, mask=inside, other=0.0)
            g = backpropagate(g.to(tl.float32), saved.to(tl.float32), ACTIVATION).to(g_ptr.dtype.element_ty)
            tl.store(g_ptr + long * N + wide, g, mask=inside)
        sums += g.to(tl.float32)
    if part_ptr is not None:
        tl.store(part_ptr + tl.program_id(0).to(tl.int64) * N + col, tl.sum(sums, axis=0), mask=col < N)


def prepass(
    dy: Tensor, saved: Tensor | None, activation: str | None, sums_dtype: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None]:
    """dy, saved (M, N) or (images, pixels, N), any strides -> g (M, N) contiguous, its sums over rows (N,).

    M = images * pixels. The sums are None where sums_dtype is. Without an activation, saved is None and so is g: dy is
    g, and what is asked for is the sums.
    """
    *images, pixels, N = dy.shape
    M = pixels * images[0] if images else pixels
    strides = [0] * 6
    for first, t in ((0, dy), (3, saved)):
        if t is not None:
            strides[first + 3 - t.ndim : first + 3] = t.stride()
    wide = N * dy.element_size() % 16 == 0
    tile = _TILE if wide else _NARROW
    # Where rows are adjacent in memory, not columns, a tile has more of them
    block_n = min(32 if images and strides[2] != 1 else 256, max(16, triton.next_power_of_2(N)))
    block_m, columns = tile // block_n, cdiv(N, block_n)
    shares = max(1, min(cdiv(M, block_m), _BESIDE * chip_of(dy).processors // columns))
    rows = max(1, cdiv(cdiv(M, block_m), shares)) * block_m
    shares = max(1, cdiv(M, rows))
    g = None if saved is None else torch.empty(M, N, dtype=dy.dtype, device=dy.device)
    part = sums = None
    if sums_dtype is not None:
        sums = torch.empty(N, dtype=sums_dtype, device=dy.device)
        part = torch.empty(shares, N, dtype=torch.float32, device=dy.device)
    with on_device_of(dy):
        activation_prepass_kernel[(shares, columns)](
            g, part, dy, saved, *strides, M, N, rows, pixels if images else None,
            activation, block_m, block_n, _STAGES, num_warps=_WARPS,
        )  # fmt: skip
    if part is not None:
        add_rows(part, sums)
    return g, sums
