"""The backward of layer_norm: ds, dw and db; see __init__.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import cdiv, chip_of, on_device_of
from ..launch.entry import entry
from ..partials import add_rows
from .rows import (
    Rows,
    RowSettings,
    backward_choice,
    grain_of,
    load_columns,
    load_rows,
    moves_single,
    rows_of,
    vector_of,
)


@triton.jit
def _eights(tile):
    """Sums of eight neighbours each: a thread or two has them, and the tile need not be kept for the reduction."""
    return tl.sum(tile.reshape(tile.shape[0], tile.shape[1] // 8, 8), axis=2)


@triton.jit
def _two_means(a, b, N):
    """Sums of rows of two tiles by one reduction, each divided by N."""
    return tl.split(tl.sum(tl.join(a, b), axis=1) / N)


@triton.jit
def _normal(s_ptr, mean_ptr, rstd_ptr, row, row_inside, stride_s, col, inside):
    """Tile of n, and rstd of its rows."""
    rstd = tl.load(rstd_ptr + row, mask=row_inside, other=0.0)
    mean = tl.load(mean_ptr + row, mask=row_inside, other=0.0)
    return (load_rows(s_ptr, row, stride_s, col, inside) - mean[:, None]) * rstd[:, None], rstd


@triton.jit
def _finish(ds_ptr, dsum_ptr, g, n, rstd, mean_g, mean_gn, row, stride_dsum, col, inside, N):
    """Store a tile of ds."""
    ds = (g - mean_g[:, None] - n * mean_gn[:, None]) * rstd[:, None]
    if dsum_ptr is not None:
        ds += load_rows(dsum_ptr, row, stride_dsum, col, inside)
    tl.store(ds_ptr + row[:, None] * N + col[None, :], ds.to(ds_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _store_sums(part_ptr, dw, db, part, col, N, DW: tl.constexpr, DB: tl.constexpr):
    """Columns of row ``part`` of part_ptr (programs, DW + DB, N) float32 or None."""
    if DW or DB:
        part_ptr += tl.cast(part, tl.int64) * (DW + DB) * N + col
    if DW:
        tl.store(part_ptr, tl.sum(dw, axis=0), mask=col < N)
    if DB:
        tl.store(part_ptr + DW * N, tl.sum(db, axis=0), mask=col < N)


@entry
def layer_norm_backward_kernel(
    ds_ptr, part_ptr,  # (rows, N) contiguous or None; (programs, DW + DB, N) float32 or None
    dy_ptr, dsum_ptr, s_ptr, weight_ptr,  # (rows, N); the same or None, twice; (N,) or None
    mean_ptr, rstd_ptr,  # (rows,)
    stride_dy, stride_dsum, stride_s, rows, N,  # N and the strides in units of GRAIN
    GRAIN: tl.constexpr, DW: tl.constexpr, DB: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program p of n: the tiles of whole rows p, p + n, p + 2n and so on."""
    N, stride_dy, stride_dsum, stride_s = N * GRAIN, stride_dy * GRAIN, stride_dsum * GRAIN, stride_s * GRAIN
    col = tl.arange(0, BLOCK_N)
    w = load_columns(weight_ptr, col, N, 1.0)
    dw = tl.zeros((BLOCK_ROWS, BLOCK_N), dtype=tl.float32)
    db = tl.zeros((BLOCK_ROWS, BLOCK_N), dtype=tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(tile, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        inside = (row < rows)[:, None] & (col < N)[None, :]
        dy = load_rows(dy_ptr, row, stride_dy, col, inside)
        if DB:
            db += dy
        if s_ptr is not None:
            n, rstd = _normal(s_ptr, mean_ptr, rstd_ptr, row, row < rows, stride_s, col, inside)
            if DW:
                dw += dy * n
            if ds_ptr is not None:
                g = dy * w
                mean_g, mean_gn = _two_means(_eights(g), _eights(g * n), N)
                _finish(ds_ptr, dsum_ptr, g, n, rstd, mean_g, mean_gn, row, stride_dsum, col, inside, N)
    _store_sums(part_ptr, dw, db, tl.program_id(0), col, N, DW, DB)


@triton.jit
def _one_row(
    ds_ptr, dy_ptr, dsum_ptr, s_ptr, weight_ptr, mean_ptr, rstd_ptr, stride_dy, stride_dsum, stride_s, row, N,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """ds of a row that is too long for the registers: it is read twice, the second time from the caches."""
    row = tl.cast(row, tl.int64) + tl.arange(0, 1)
    there = row >= 0
    sum_g = tl.zeros((1, BLOCK_N // 8), dtype=tl.float32)
    sum_gn = tl.zeros((1, BLOCK_N // 8), dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        inside = (col < N)[None, :]
        g = load_rows(dy_ptr, row, stride_dy, col, inside) * load_columns(weight_ptr, col, N, 1.0)
        n, _ = _normal(s_ptr, mean_ptr, rstd_ptr, row, there, stride_s, col, inside)
        sum_g += _eights(g)
        sum_gn += _eights(g * n)
    mean_g, mean_gn = _two_means(sum_g, sum_gn, N)
    blocks = tl.cdiv(N, BLOCK_N)
    for i in range(blocks):
        col = (blocks - 1 - i) * BLOCK_N + tl.arange(0, BLOCK_N)  # backwards: the last ones are the nearest
        inside = (col < N)[None, :]
        g = load_rows(dy_ptr, row, stride_dy, col, inside) * load_columns(weight_ptr, col, N, 1.0)
        n, rstd = _normal(s_ptr, mean_ptr, rstd_ptr, row, there, stride_s, col, inside)
        _finish(ds_ptr, dsum_ptr, g, n, rstd, mean_g, mean_gn, row, stride_dsum, col, inside, N)


@entry
def layer_norm_long_rows_kernel(
    ds_ptr, part_ptr, dy_ptr, dsum_ptr, s_ptr, weight_ptr, mean_ptr, rstd_ptr,  # as above
    stride_dy, stride_dsum, stride_s, rows, N,  # N and the strides in units of GRAIN
    GRAIN: tl.constexpr, DW: tl.constexpr, DB: tl.constexpr, BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """ds of one row, or dw and db of a block of columns over a chunk of rows.

    A chunk has a program for each of its rows, then one for each block of columns. Processors begin programs about in
    this order, so that the second of them to read an element finds it in L2. Nothing but time rests on that.
    """
    N, stride_dy, stride_dsum, stride_s = N * GRAIN, stride_dy * GRAIN, stride_dsum * GRAIN, stride_s * GRAIN
    takers = CHUNK if ds_ptr is not None else 0
    blocks = tl.cdiv(N, BLOCK_COLS) if DW or DB else 0
    chunk, number = tl.program_id(0) // (takers + blocks), tl.program_id(0) % (takers + blocks)
    if number < takers:
        if ds_ptr is not None and chunk * CHUNK + number < rows:
            _one_row(
                ds_ptr, dy_ptr, dsum_ptr, s_ptr, weight_ptr, mean_ptr, rstd_ptr, stride_dy, stride_dsum, stride_s,
                chunk * CHUNK + number, N, BLOCK_N,
            )  # fmt: skip
    elif DW or DB:
        col = (number - takers) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
        dw = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
        db = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
        last = tl.minimum((chunk + 1) * CHUNK, rows)
        for first in tl.range(chunk * CHUNK, last, BLOCK_ROWS, num_stages=STAGES):
            row = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_ROWS)
            inside = (row < last)[:, None] & (col < N)[None, :]
            dy = load_rows(dy_ptr, row, stride_dy, col, inside)
            if DB:
                db += dy
            if DW:
                dw += dy * _normal(s_ptr, mean_ptr, rstd_ptr, row, row < last, stride_s, col, inside)[0]
        _store_sums(part_ptr, dw, db, chunk, col, N, DW, DB)


def layer_norm_bwd(
    dy: Tensor, dsum: Tensor | None, s: Tensor | None, mean: Tensor, rstd: Tensor, weight: Tensor | None, N: int, *,
    dtype: torch.dtype | None = None, dweight: torch.dtype | None = None, dbias: torch.dtype | None = None,
    settings: RowSettings | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dy, dsum, s (..., of N elements), dsum or None -> ds, dw, db; None for each whose dtype is None.

    dtype, dweight, dbias: the dtypes of ds, dw and db. s may be None where db alone is asked for.
    """
    shape, rows = dy.shape, dy.numel() // N if N else 0
    ds = None if dtype is None else torch.empty(shape, dtype=dtype, device=dy.device)
    if rows == 0:
        return ds, *(t if t is None else torch.zeros(N, dtype=t, device=dy.device) for t in (dweight, dbias))
    dw, db = (t if t is None else torch.empty(N, dtype=t, device=dy.device) for t in (dweight, dbias))
    dy, dsum = rows_of(dy, N), None if dsum is None or ds is None else rows_of(dsum, N)
    s = rows_of(s, N) if ds is not None or dw is not None else None
    single = moves_single(N, dy, dsum, s)
    problem = Rows(rows, N, dy.element_size(), 3 + (dsum is not None), single)
    settings = settings or backward_choice(chip_of(dy), problem)
    sums = [t for t in (dw, db) if t is not None]
    tiles = cdiv(rows, settings.CHUNK or settings.BLOCK_ROWS)
    parts = tiles if settings.CHUNK or not sums else min(tiles, settings.programs)
    part = torch.empty(parts, len(sums), N, dtype=torch.float32, device=dy.device) if sums else None
    grain = grain_of(N, dy, dsum, s)
    arrays = ds, part, dy, dsum, s, vector_of(weight), mean, rstd
    sizes = *(0 if t is None else t.stride(0) // grain for t in (dy, dsum, s)), rows, N // grain
    asked = grain, dw is not None, db is not None
    with on_device_of(dy):
        if not settings.CHUNK:
            layer_norm_backward_kernel[(parts,)](
                *arrays, *sizes, *asked, settings.BLOCK_ROWS, settings.BLOCK_N, settings.STAGES,
                num_warps=settings.num_warps,
            )  # fmt: skip
        else:
            programs = (settings.CHUNK if ds is not None else 0) + (cdiv(N, settings.BLOCK_COLS) if sums else 0)
            layer_norm_long_rows_kernel[(parts * programs,)](
                *arrays, *sizes, *asked, settings.BLOCK_N, settings.CHUNK, settings.BLOCK_ROWS, settings.BLOCK_COLS,
                settings.STAGES, num_warps=settings.num_warps,
            )  # fmt: skip
        if sums:
            add_rows(part.view(parts, -1), *sums)
    return ds, dw, db
