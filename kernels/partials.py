"""The sums of a reduction that was split over programs: float32 partial results, added in a fixed order."""

import triton
import triton.language as tl
from torch import Tensor

from .activation import activate, backpropagate
from .device import cdiv, chip_of, on_device_of
from .launch.entry import entry

_BLOCK = 1024  # elements per program


@entry
def reduce_partials_kernel(
    out_ptr, out_saved_ptr, out_sums_ptr,  # results: numel elements of dense memory, the same, (sums,)
    part_ptr, bias_ptr, addend_ptr, slope_ptr,  # part (splits, total) float32: a result, then sums; last two: as it
    channels, inner, numel, sums, total, splits,  # element i of a result takes the bias i // inner % channels
    ACTIVATION: tl.constexpr, SLOPE_OF: tl.constexpr, PRECISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK elements of the partial sums, added in order and finished."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    z = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(splits):
        z += tl.load(part_ptr + offs, mask=offs < total, other=0.0)
        part_ptr += total
    if out_sums_ptr is not None:
        i = offs - numel
        tl.store(out_sums_ptr + i, z.to(out_sums_ptr.dtype.element_ty), mask=(i >= 0) & (i < sums))
    if addend_ptr is not None:
        z += tl.load(addend_ptr + offs, mask=offs < numel, other=0.0)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + offs // inner % channels, mask=offs < numel, other=0.0).to(tl.float32)
    if slope_ptr is not None:
        slope = tl.load(slope_ptr + offs, mask=offs < numel, other=0.0).to(tl.float32)
        z = backpropagate(z, slope, SLOPE_OF)
    y, kept = activate(z, ACTIVATION, PRECISE)
    tl.store(out_ptr + offs, y.to(out_ptr.dtype.element_ty), mask=offs < numel)
    if out_saved_ptr is not None:
        tl.store(out_saved_ptr + offs, kept.to(out_saved_ptr.dtype.element_ty), mask=offs < numel)


def partial_length(numel: int, sums: int) -> int:
    """Elements of one row of the partial sums: a result and the sums, up to a 16-byte boundary."""
    return cdiv(numel + sums, 16) * 16


def reduce_partials(
    out: Tensor, out_saved: Tensor | None, out_sums: Tensor | None, part: Tensor, bias: Tensor | None,
    activation: str | None, precise: bool, *, inner: int = 1, addend: Tensor | None = None,
    slope: Tensor | None = None, slope_of: str | None = None,
) -> None:  # fmt: skip
    """part (splits, partial_length) -> out and out_saved, dense and laid out alike, and out_sums (sums,).

    bias (channels,): element i of out's memory belongs to channel i // inner % channels. addend: float32, laid out as
    out, which it may be. slope, slope_of: see matmul.py; laid out as out. Call on the GPU of out.
    """
    splits, total = part.shape
    channels, sums = (1 if t is None else t.numel() for t in (bias, out_sums))
    reduce_partials_kernel[(cdiv(total, _BLOCK),)](
        out, out_saved, out_sums, part, bias, addend, slope, channels, inner, out.numel(), sums, total, splits,
        activation, slope_of, precise, _BLOCK, num_warps=4,
    )  # fmt: skip


@entry
def add_rows_kernel(
    out_ptr, second_ptr,  # (first,), (cols - first,) or None
    source_ptr, stride, rows, cols, first, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_COLS sums."""
    col = tl.program_id(0).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
    for start in range(0, rows, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        inside = (row < rows)[:, None] & (col < cols)[None, :]
        offsets = row.to(tl.int64)[:, None] * stride + col[None, :]
        sums += tl.load(source_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    total = tl.sum(sums, axis=0)
    tl.store(out_ptr + col, total.to(out_ptr.dtype.element_ty), mask=col < first)
    if second_ptr is not None:
        at = col - first
        tl.store(second_ptr + at, total.to(second_ptr.dtype.element_ty), mask=(at >= 0) & (col < cols))


def add_rows(source: Tensor, out: Tensor, second: Tensor | None = None) -> None:
    """Sums over the rows of source (rows, cols), whose elements are adjacent, into out and, from its end on, second.

    In float32, in an order that depends on the sizes and the GPU alone.
    """
    rows, cols = source.shape
    fill = cdiv(cols, chip_of(source).processors)
    width = next((w for w in (32, 64, 128) if w >= fill), 256)
    height = min(max(triton.next_power_of_2(rows), 1), 4096 // width)
    with on_device_of(source):
        add_rows_kernel[(cdiv(cols, width),)](
            out, second, source, source.stride(0), rows, cols, out.numel(), height, width, num_warps=4
        )  # fmt: skip
