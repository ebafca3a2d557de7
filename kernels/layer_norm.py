"""Layer normalisation of a sum, in one pass over memory, and its gradients.

    s  = x + residual            n = (s - mean) rstd        rstd = 1 / sqrt(variance + eps)
    y  = n w + b                 mean, variance over the N elements of a row, the variance biased
    g  = dy w                    ds = rstd (g - mean(g) - n mean(g n)) + upstream gradient of s
    dw = sum over rows of dy n   db = sum over rows of dy             dx = dresidual = ds

Source: Ba, Kiros, Hinton, "Layer Normalization" (2016), equations 3 and 4.
Shapes: x, residual, s, y (rows, N), elements of a row adjacent; w, b (N,); mean, rstd (rows,) float32.

s is rounded to its dtype first, and y comes from the rounded s, as in PyTorch: what the forward normalises is what it
returns and what the backward reads again, and y does not depend on whether s is kept. Statistics are in float32, the
variance from centred elements. A row too long for the registers is read twice: statistics of its blocks are merged
(Chan, Golub, LeVeque 1979, equation 1.5), then its second read comes from L2.

dw and db are summed by programs that walk over the rows with their sums in registers, and those are added by one
more kernel in a fixed order: two runs are bitwise equal. A row too long for that is cut into blocks of columns; the
means over the row then come from a kernel before, and dy and s are read twice.

FLOPs: about 8 an element forward, 14 backward. Traffic: forward x (and residual) in, y (and s) out; backward dy, s
(and the gradient of s) in, ds out, once each up to the width that one program can hold.
"""

import torch
import triton
import triton.language as tl

from .entry import entry
from .launch import cdiv, chip_of, on_device_of
from .layer_norm_settings import Rows, RowSettings, backward_choice, forward_choice
from .partials import add_rows

_TL = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _tile(ptr, row, stride, col, inside):
    """Tile of rows in float32, zero where it is not inside."""
    return tl.load(ptr + row[:, None] * stride + col[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _sum_tile(x_ptr, residual_ptr, row, stride_x, stride_r, col, inside, SUM: tl.constexpr):
    """Tile of s, rounded to its dtype SUM, in float32."""
    s = _tile(x_ptr, row, stride_x, col, inside)
    if residual_ptr is not None:
        s = (s + _tile(residual_ptr, row, stride_r, col, inside)).to(SUM).to(tl.float32)
    return s


@triton.jit
def _columns(ptr, col, N, default: tl.constexpr):
    """A row of weights or biases (1, BLOCK_N)."""
    if ptr is None:
        values = tl.full((1, col.shape[0]), default, dtype=tl.float32)
    else:
        values = tl.load(ptr + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
    return values


@triton.jit
def _finish(y_ptr, weight_ptr, bias_ptr, normal, row, col, inside, N):
    y = normal * _columns(weight_ptr, col, N, 1.0) + _columns(bias_ptr, col, N, 0.0)
    tl.store(y_ptr + row[:, None] * N + col[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@entry
def _forward_kernel(
    y_ptr, sum_ptr, mean_ptr, rstd_ptr,  # (rows, N) contiguous, the same or None; (rows,) float32 or None
    x_ptr, residual_ptr, weight_ptr, bias_ptr,  # (rows, N); the same or None; (N,) or None
    stride_x, stride_r,  # between rows, in elements
    rows, N, eps,
    SUM: tl.constexpr,  # dtype of s
    LOOPED: tl.constexpr,  # a row is longer than a tile
    BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_ROWS whole rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_inside = row < rows
    if LOOPED:
        mean = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
        squares = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
        for start in range(0, N, BLOCK_N):
            col = start + tl.arange(0, BLOCK_N)
            inside = row_inside[:, None] & (col[None, :] < N)
            s = _sum_tile(x_ptr, residual_ptr, row, stride_x, stride_r, col, inside, SUM)
            if sum_ptr is not None:
                tl.store(sum_ptr + row[:, None] * N + col[None, :], s.to(SUM), mask=inside)
            count = tl.minimum(N - start, BLOCK_N).to(tl.float32)
            block_mean = tl.sum(s, axis=1) / count
            centred = tl.where(inside, s - block_mean[:, None], 0.0)
            share = count / (count + start)
            step = block_mean - mean
            mean += step * share
            squares += tl.sum(centred * centred, axis=1) + step * step * share * start
        rstd = tl.rsqrt(squares / N + eps)
        blocks = tl.cdiv(N, BLOCK_N)
        for i in range(blocks):
            col = (blocks - 1 - i) * BLOCK_N + tl.arange(0, BLOCK_N)  # backwards: the last ones are still in the caches
            inside = row_inside[:, None] & (col[None, :] < N)
            s = _sum_tile(x_ptr, residual_ptr, row, stride_x, stride_r, col, inside, SUM)
            _finish(y_ptr, weight_ptr, bias_ptr, (s - mean[:, None]) * rstd[:, None], row, col, inside, N)
    else:
        col = tl.arange(0, BLOCK_N)
        inside = row_inside[:, None] & (col[None, :] < N)
        s = _sum_tile(x_ptr, residual_ptr, row, stride_x, stride_r, col, inside, SUM)
        if sum_ptr is not None:
            tl.store(sum_ptr + row[:, None] * N + col[None, :], s.to(SUM), mask=inside)
        mean = tl.sum(s, axis=1) / N
        centred = tl.where(inside, s - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / N + eps)
        _finish(y_ptr, weight_ptr, bias_ptr, centred * rstd[:, None], row, col, inside, N)
    if mean_ptr is not None:
        tl.store(mean_ptr + row, mean, mask=row_inside)
        tl.store(rstd_ptr + row, rstd, mask=row_inside)


@entry
def _row_means_kernel(
    means_ptr,  # (2, rows) float32: mean(g), mean(g n)
    dy_ptr, s_ptr, weight_ptr, mean_ptr, rstd_ptr,  # (rows, N); the same; (N,) or None; (rows,)
    stride_dy, stride_s, rows, N, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: a row that is too long to be held."""
    pid = tl.program_id(0).to(tl.int64)
    row = pid + tl.arange(0, 1)
    mean, rstd = tl.load(mean_ptr + pid), tl.load(rstd_ptr + pid)
    first = tl.zeros((1, BLOCK_N), dtype=tl.float32)
    second = tl.zeros((1, BLOCK_N), dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        inside = (col < N)[None, :]
        g = _tile(dy_ptr, row, stride_dy, col, inside) * _columns(weight_ptr, col, N, 1.0)
        first += g
        second += g * (_tile(s_ptr, row, stride_s, col, inside) - mean) * rstd
    tl.store(means_ptr + row, tl.sum(first, axis=1) / N)
    tl.store(means_ptr + rows + row, tl.sum(second, axis=1) / N)


@entry
def _backward_kernel(
    ds_ptr, part_ptr,  # (rows, N) contiguous or None; (programs, DW + DB, N) float32 or None
    dy_ptr, dsum_ptr, s_ptr, weight_ptr,  # (rows, N); the same or None, twice; (N,) or None
    mean_ptr, rstd_ptr, means_ptr,  # (rows,); means (2, rows), or None where a program holds whole rows
    stride_dy, stride_dsum, stride_s, rows, N,
    DW: tl.constexpr, DB: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (p, c): block c of the columns of every programs-th tile of rows, from p on."""
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    w = _columns(weight_ptr, col, N, 1.0)
    dw = tl.zeros((BLOCK_ROWS, BLOCK_N), dtype=tl.float32)
    db = tl.zeros((BLOCK_ROWS, BLOCK_N), dtype=tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(tile, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        inside = (row < rows)[:, None] & (col[None, :] < N)
        dy = _tile(dy_ptr, row, stride_dy, col, inside)
        if DB:
            db += dy
        if s_ptr is not None:
            rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
            mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)
            n = (_tile(s_ptr, row, stride_s, col, inside) - mean[:, None]) * rstd[:, None]
            if DW:
                dw += dy * n
            if ds_ptr is not None:
                g = dy * w
                if means_ptr is None:
                    mean_g, mean_gn = tl.sum(g, axis=1) / N, tl.sum(g * n, axis=1) / N
                else:
                    mean_g = tl.load(means_ptr + row, mask=row < rows, other=0.0)
                    mean_gn = tl.load(means_ptr + rows + row, mask=row < rows, other=0.0)
                ds = (g - mean_g[:, None] - n * mean_gn[:, None]) * rstd[:, None]
                if dsum_ptr is not None:
                    ds += _tile(dsum_ptr, row, stride_dsum, col, inside)
                tl.store(ds_ptr + row[:, None] * N + col[None, :], ds.to(ds_ptr.dtype.element_ty), mask=inside)
    if DW or DB:
        part_ptr += tl.program_id(0).to(tl.int64) * (DW + DB) * N + col
        if DW:
            tl.store(part_ptr, tl.sum(dw, axis=0), mask=col < N)
        if DB:
            tl.store(part_ptr + DW * N, tl.sum(db, axis=0), mask=col < N)


def _rows(t, N):
    """(..., normalised axes) -> (rows, N) with adjacent elements; a view where strides allow."""
    t = t if t.dim() == 2 and t.shape[1] == N else t.reshape(t.numel() // N, N)
    return t if N == 1 or t.stride(1) == 1 else t.contiguous()


def _vector(t):
    return t if t is None or (t.dim() == 1 and t.is_contiguous()) else t.reshape(-1).contiguous()


def layer_norm_fwd(
    x, residual, weight, bias, N, eps, *, dtype=None, keep_sum=True, keep=True, settings: RowSettings | None = None
):
    """x, residual (..., of N elements), the latter or None; weight, bias of N elements or None -> y, s, mean, rstd.

    dtype: of y, None for that of s. keep_sum: return s, else None; None too where there is no residual. keep: return
    mean and rstd (rows,), else None.
    """
    sum_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = torch.empty(x.shape, dtype=dtype or sum_dtype, device=x.device)
    s = torch.empty(x.shape, dtype=sum_dtype, device=x.device) if keep_sum and residual is not None else None
    rows = x.numel() // N if N else 0
    mean, rstd = (torch.empty(rows, dtype=torch.float32, device=x.device) if keep else None for _ in range(2))
    if rows == 0:
        return y, s, mean, rstd
    x, residual = _rows(x, N), None if residual is None else _rows(residual, N)
    arrays = 2 + (residual is not None) + (s is not None)
    cut = settings or forward_choice(chip_of(x), Rows(rows, N, x.element_size(), arrays))
    with on_device_of(x):
        _forward_kernel[(cdiv(rows, cut.BLOCK_ROWS),)](
            y, s, mean, rstd, x, residual, _vector(weight), _vector(bias),
            x.stride(0), 0 if residual is None else residual.stride(0), rows, N, eps,
            _TL[sum_dtype], N > cut.BLOCK_N, cut.BLOCK_ROWS, cut.BLOCK_N, num_warps=cut.num_warps,
        )  # fmt: skip
    return y, s, mean, rstd


def layer_norm_bwd(
    dy, dsum, s, mean, rstd, weight, N, *, dtype=None, dweight=None, dbias=None, settings: RowSettings | None = None
):
    """dy, dsum, s (..., of N elements), dsum or None -> ds, dw, db; None for each whose dtype is None.

    dtype, dweight, dbias: the dtypes of ds, dw and db. s may be None where db alone is asked for.
    """
    shape, rows = dy.shape, dy.numel() // N if N else 0
    ds = None if dtype is None else torch.empty(shape, dtype=dtype, device=dy.device)
    if rows == 0:
        return ds, *(t if t is None else torch.zeros(N, dtype=t, device=dy.device) for t in (dweight, dbias))
    dw, db = (t if t is None else torch.empty(N, dtype=t, device=dy.device) for t in (dweight, dbias))
    dy, dsum = _rows(dy, N), None if dsum is None else _rows(dsum, N)
    s = _rows(s, N) if ds is not None or dw is not None else None
    cut = settings or backward_choice(chip_of(dy), Rows(rows, N, dy.element_size(), 3 + (dsum is not None)))
    tiles, blocks = cdiv(rows, cut.BLOCK_ROWS), cdiv(N, cut.BLOCK_N)
    sums = [t for t in (dw, db) if t is not None]
    programs = min(tiles, cut.programs) if sums else tiles
    part = torch.empty(programs, len(sums), N, dtype=torch.float32, device=dy.device) if sums else None
    means = None
    weight = _vector(weight)
    with on_device_of(dy):
        if ds is not None and blocks > 1:
            means = torch.empty(2, rows, dtype=torch.float32, device=dy.device)
            _row_means_kernel[(rows,)](
                means, dy, s, weight, mean, rstd, dy.stride(0), s.stride(0), rows, N,
                cut.BLOCK_N, num_warps=cut.num_warps,
            )  # fmt: skip
        _backward_kernel[(programs, blocks)](
            ds, part, dy, dsum if ds is not None else None, s, weight, mean, rstd, means,
            dy.stride(0), 0 if dsum is None else dsum.stride(0), 0 if s is None else s.stride(0), rows, N,
            dw is not None, db is not None, cut.BLOCK_ROWS, cut.BLOCK_N, cut.STAGES, num_warps=cut.num_warps,
        )  # fmt: skip
        if sums:
            add_rows(part.view(programs, -1), *sums)
    return ds, dw, db
