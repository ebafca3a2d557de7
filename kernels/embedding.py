"""Rows of a token table plus rows of a position table, and the gradients of both tables.

    y[m] = weight[input[m]] + position[p[m]]              p[m] = position_ids[m], or m mod T
    dweight[v]   = sum of dy[m] over m with input[m] = v, in the order of m; 0 for the row of padding_idx
    dposition[p] = sum of dy[m] over m with p[m] = p

Shapes: input, p (M,), weight (V, D), position (P, D), y (M, D); T: the last axis of input.

y is summed in float32 and rounded once. An index outside its table reads nothing and gives a row of NaN, and no
gradient: to raise an error, the host would have to wait for the GPU.

The gradient of a table gathers instead of scattering. Indices are sorted on the GPU (stable: equal ones stay in the
order of m), so that a row of the table is the sum over one run. Programs take CHUNK sorted indices each: they load
those rows of dy at once and add run by run. A run inside a chunk is finished there; one that crosses into others
leaves float32 partial sums, two a chunk at most, which the program of the chunk where it starts adds in order. That
holds for an index that never repeats as for one that is half of all, of any vocabulary; nothing depends on values but
which of the stores happen, so that it can be captured in a CUDA graph; no atomics, and two runs are bitwise equal.
Positions that follow the axis need no sort: dposition is a sum over the leading axes.

FLOPs: one addition an element. Traffic: forward M rows (or each used row once, where L2 holds the table) in, M out;
backward dy in, once for each table, and the table out.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import Chip, cdiv, chip_of, on_device_of
from .launch.entry import entry
from .partials import add_rows
from .tile_settings import Grid, GridSettings, grid_choice
from .tunable import Choice, bucket_of


@triton.jit
def _gather(table_ptr, ids, col, rows, stride_row, stride_col, inside):
    """Rows of a table in float32; NaN where an index is outside it."""
    there = (ids >= 0) & (ids < rows)
    offsets = ids.to(tl.int64)[:, None] * stride_row + col.to(tl.int64)[None, :] * stride_col
    return tl.load(table_ptr + offsets, mask=inside & there[:, None], other=float("nan")).to(tl.float32)


@entry
def embedding_forward_kernel(
    y_ptr,  # (M, D) contiguous
    input_ptr, weight_ptr, position_ptr, position_ids_ptr,  # (M,), (V, D), (P, D) or None, (period,) or None
    stride_wv, stride_wd, stride_pp, stride_pd,  # in elements
    M, D, V, P, period,  # token m has position m mod period, or what position_ids says there
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """One program: a tile of y."""
    tiles = tl.cdiv(D, BLOCK_COLS)
    pid = tl.program_id(0)
    row = (pid // tiles).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = pid % tiles * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    inside = (row < M)[:, None] & (col < D)[None, :]
    ids = tl.load(input_ptr + row, mask=row < M, other=0)
    y = _gather(weight_ptr, ids, col, V, stride_wv, stride_wd, inside)
    if position_ptr is not None:
        p = row % period
        if position_ids_ptr is not None:
            p = tl.load(position_ids_ptr + p, mask=row < M, other=0)
        y += _gather(position_ptr, p, col, P, stride_pp, stride_pd, inside)
    tl.store(y_ptr + row[:, None] * D + col[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@entry
def embedding_runs_kernel(
    table_ptr, part_ptr,  # (V, D) contiguous; (chunks, 2, D) float32
    dy_ptr, sorted_ptr, order_ptr,  # (M, D); (M,): indices in ascending order, and whose they are
    stride_row, stride_col, M, D, V, padding,
    CHUNK: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Program (c, d): the runs in chunk c of the sorted indices, for block d of the columns.

    part[c, 0]: the sum of a run that began in an earlier chunk; part[c, 1]: of one that begins here and goes on.
    """
    begin = tl.program_id(0).to(tl.int64) * CHUNK
    col = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    inside = col < D
    ids, rows = (), ()
    for i in tl.static_range(CHUNK):
        at = begin + i
        v = tl.load(sorted_ptr + at, mask=at < M, other=-1)
        m = tl.load(order_ptr + at, mask=at < M, other=0)
        counts = (v >= 0) & (v < V) & (v != padding)  # else 0 is added
        dy = tl.load(dy_ptr + m * stride_row + col.to(tl.int64) * stride_col, mask=inside & counts, other=0.0)
        ids, rows = ids + (v,), rows + (dy,)
    ids = ids + (tl.load(sorted_ptr + begin + CHUNK, mask=begin + CHUNK < M, other=-1),)
    came = (begin > 0) & (tl.load(sorted_ptr + begin - 1, mask=begin > 0, other=-1) == ids[0])
    part_ptr += tl.program_id(0).to(tl.int64) * 2 * D + col
    sums = tl.zeros((BLOCK_COLS,), dtype=tl.float32)
    for i in tl.static_range(CHUNK):
        v, at = ids[i], begin + i
        sums += rows[i].to(tl.float32)
        goes_on = (at + 1 < M) & (ids[i + 1] == v)
        ends = (at < M) & (goes_on == 0)
        whole = ends & (came == 0) & (v >= 0) & (v < V)
        tl.store(table_ptr + v.to(tl.int64) * D + col, sums.to(table_ptr.dtype.element_ty), mask=inside & whole)
        if i == CHUNK - 1:
            tl.store(part_ptr, sums, mask=inside & came & (at < M))
            tl.store(part_ptr + D, sums, mask=inside & goes_on & (came == 0))
        else:
            tl.store(part_ptr, sums, mask=inside & came & ends)
        sums = tl.where(ends, 0.0, sums)
        came = came & (ends == 0)


@entry
def embedding_join_kernel(
    table_ptr, part_ptr, sorted_ptr,  # (V, D) contiguous; (chunks, 2, D) float32; (M,)
    chunks, D, V,
    CHUNK: tl.constexpr, BLOCK_CHUNKS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Program (c, d): the run that starts in chunk c and goes on past it, if there is one."""
    chunk = tl.program_id(0).to(tl.int64)
    begin = chunk * CHUNK
    col = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    inside = col < D
    v = tl.load(sorted_ptr + begin + CHUNK - 1)
    goes_on = tl.load(sorted_ptr + begin + CHUNK) == v
    came = (begin > 0) & (tl.load(sorted_ptr + begin - 1, mask=begin > 0, other=-1) == v)  # sorted: all of c is v
    if goes_on & (came == 0) & (v >= 0) & (v < V):
        sums = tl.zeros((BLOCK_CHUNKS, BLOCK_COLS), dtype=tl.float32)
        first = chunk + 1
        while goes_on:
            c = first + tl.arange(0, BLOCK_CHUNKS)
            same = tl.load(sorted_ptr + c * CHUNK, mask=c < chunks, other=-1) == v
            parts = part_ptr + c[:, None] * 2 * D + col[None, :]
            sums += tl.load(parts, mask=same[:, None] & inside[None, :], other=0.0)
            first += BLOCK_CHUNKS
            goes_on = tl.sum(same.to(tl.int32), axis=0) == BLOCK_CHUNKS
        total = tl.load(part_ptr + (chunk * 2 + 1) * D + col, mask=inside, other=0.0) + tl.sum(sums, axis=0)
        tl.store(table_ptr + v.to(tl.int64) * D + col, total.to(table_ptr.dtype.element_ty), mask=inside)


class RunSettings(NamedTuple):
    """How the backward cuts up the sorted indices."""

    CHUNK: int = 16  # indices a program, all of whose rows are in flight at once
    BLOCK_COLS: int = 256
    BLOCK_CHUNKS: int = 32  # chunks whose partial sums are in flight at once


class Runs(NamedTuple):
    """What RunSettings depend on."""

    indices: int
    cols: int
    itemsize: int  # of an element of dy, in bytes


def run_default(gpu: Chip, p: Runs) -> RunSettings:
    """Columns of 16 bytes for each lane of one warp."""
    widest = (64 if gpu.is_amd else 32) * 16 // p.itemsize
    return RunSettings(BLOCK_COLS=min(triton.next_power_of_2(p.cols), widest))


def run_bucket(p: Runs) -> str:
    return bucket_of(p.indices, p.cols, item=p.itemsize)


def run_fits(gpu: Chip, p: Runs, s: RunSettings) -> bool:
    """Whether a lane holds the rows of a chunk in 128 registers."""
    lanes = 64 if gpu.is_amd else 32
    return s.CHUNK * s.BLOCK_COLS * p.itemsize <= 128 * 4 * lanes and 2 * max(p.cols, 16) > s.BLOCK_COLS


forward_choice = grid_choice("embedding_forward")
run_choice = Choice("embedding_backward", RunSettings, run_bucket, run_fits, run_default)


def embedding_fwd(
    ids: Tensor, weight: Tensor, position: Tensor | None, position_ids: Tensor | None, period: int,
    settings: GridSettings | None = None,
) -> Tensor:  # fmt: skip
    """ids (...), weight (V, D), position (P, D) or None, each of any strides -> y (..., D).

    Token m, counted through all axes of ids, has position m mod period, or the element there of position_ids
    (period,), which is contiguous.
    """
    M, (V, D) = ids.numel(), weight.shape
    dtype = weight.dtype if position is None else torch.promote_types(weight.dtype, position.dtype)
    y = torch.empty(*ids.shape, D, dtype=dtype, device=weight.device)
    if y.numel() == 0:
        return y
    tables = 1 if position is None else 2
    settings = settings or forward_choice(chip_of(weight), Grid(M, D, weight.element_size(), tables))
    positions, strides = (1, (0, 0)) if position is None else (position.shape[0], position.stride())
    with on_device_of(weight):
        embedding_forward_kernel[(cdiv(M, settings.BLOCK_ROWS) * cdiv(D, settings.BLOCK_COLS),)](
            y, ids.contiguous(), weight, position, position_ids, *weight.stride(), *strides,
            M, D, V, positions, period, settings.BLOCK_ROWS, settings.BLOCK_COLS, num_warps=settings.num_warps,
        )  # fmt: skip
    return y


def embedding_bwd(
    dy: Tensor, ids: Tensor, rows: int, dtype: torch.dtype, padding: int | None = None,
    settings: RunSettings | None = None,
) -> Tensor:  # fmt: skip
    """dy (..., D), any strides; ids (...) -> gradient (rows, D) of the table that ids index, row ``padding`` zero."""
    M, D = ids.numel(), dy.shape[-1]
    table = torch.zeros(rows, D, dtype=dtype, device=dy.device)
    if dy.numel() == 0 or rows == 0:
        return table
    dy = dy.reshape(M, D)
    ordered, order = torch.sort(ids.reshape(M), stable=True)
    settings = settings or run_choice(chip_of(dy), Runs(M, D, dy.element_size()))
    chunks, blocks = cdiv(M, settings.CHUNK), cdiv(D, settings.BLOCK_COLS)
    part = torch.empty(chunks, 2, D, dtype=torch.float32, device=dy.device)
    padding = -1 if padding is None else padding
    with on_device_of(dy):
        embedding_runs_kernel[(chunks, blocks)](
            table, part, dy, ordered, order, *dy.stride(), M, D, rows, padding,
            settings.CHUNK, settings.BLOCK_COLS, num_warps=1,
        )  # fmt: skip
        if chunks > 1:
            embedding_join_kernel[(chunks - 1, blocks)](
                table, part, ordered, chunks, D, rows,
                settings.CHUNK, settings.BLOCK_CHUNKS, settings.BLOCK_COLS, num_warps=4,
            )  # fmt: skip
    return table


def embedding_bwd_axis(dy: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """dy (..., T, D), any strides -> gradient (rows, D) of a table whose row t is added at place t of that axis."""
    T, D = dy.shape[-2:]
    table = (torch.zeros if rows > T or dy.numel() == 0 else torch.empty)(rows, D, dtype=dtype, device=dy.device)
    if dy.numel():
        add_rows(dy.reshape(-1, T * D).contiguous(), table[:T].view(-1))
    return table
