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
more kernel in a fixed order: two runs are bitwise equal. Rows too long for that have programs for ds, a row each, and
programs for dw and db, a block of columns over a chunk of rows each. Both read dy and s, and run so close after each
other that one of them finds them in L2. The parts:

    rows.py       tiles of rows, and how rows are cut up
    __init__.py   y, s and what the backward needs
    backward.py   ds, dw, db

FLOPs: about 8 an element forward, 14 backward. Traffic: forward x (and residual) in, y (and s) out; backward dy, s
(and the gradient of s) in, ds out, once each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import cdiv, chip_of, on_device_of
from ..launch.entry import entry
from .backward import layer_norm_bwd
from .rows import (
    Rows,
    RowSettings,
    forward_choice,
    forward_parts,
    grain_of,
    load_columns,
    load_rows,
    rows_of,
    vector_of,
)

__all__ = ["layer_norm_bwd", "layer_norm_fwd"]

_TL = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _sum_tile(x_ptr, residual_ptr, row, stride_x, stride_r, col, inside, SUM: tl.constexpr):
    """Tile of s, rounded to its dtype SUM, in float32."""
    s = load_rows(x_ptr, row, stride_x, col, inside)
    if residual_ptr is not None:
        s = (s + load_rows(residual_ptr, row, stride_r, col, inside)).to(SUM).to(tl.float32)
    return s


@triton.jit
def _finish(y_ptr, weight_ptr, bias_ptr, normal, row, col, inside, N):
    y = normal * load_columns(weight_ptr, col, N, 1.0) + load_columns(bias_ptr, col, N, 0.0)
    tl.store(y_ptr + row[:, None] * N + col[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _part(part, row_inside, N, WIDTH: tl.constexpr):
    """Columns of a part of a tile; where they and the rows are inside."""
    col = part * WIDTH + tl.arange(0, WIDTH)
    return col, row_inside[:, None] & (col[None, :] < N)


@triton.jit
def _added(tiles, COUNT: tl.constexpr):
    """The sum of tiles, element by element."""
    total = tiles[0]
    for i in tl.static_range(1, COUNT):
        total += tiles[i]
    return total


@entry
def layer_norm_forward_kernel(
    y_ptr, sum_ptr, mean_ptr, rstd_ptr,  # (rows, N) contiguous, the same or None; (rows,) float32 or None
    x_ptr, residual_ptr, weight_ptr, bias_ptr,  # (rows, N); the same or None; (N,) or None
    stride_x, stride_r,  # between rows; these and N in units of GRAIN
    rows, N, eps,
    SUM: tl.constexpr,  # dtype of s
    LOOPED: tl.constexpr,  # a row is longer than a tile
    GRAIN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,  # in which a tile is read and written, so that fewer values live at once
):  # fmt: skip
    """One program: BLOCK_ROWS whole rows."""
    N, stride_x, stride_r = N * GRAIN, stride_x * GRAIN, stride_r * GRAIN
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
        tiles = ()
        for part in tl.static_range(PARTS):
            col, inside = _part(part, row_inside, N, BLOCK_N // PARTS)
            s = _sum_tile(x_ptr, residual_ptr, row, stride_x, stride_r, col, inside, SUM)
            if sum_ptr is not None:
                tl.store(sum_ptr + row[:, None] * N + col[None, :], s.to(SUM), mask=inside)
            tiles = tiles + (s,)
        mean = tl.sum(_added(tiles, PARTS), axis=1) / N
        centred, squares = (), ()
        for part in tl.static_range(PARTS):
            col, inside = _part(part, row_inside, N, BLOCK_N // PARTS)
            s = tl.where(inside, tiles[part] - mean[:, None], 0.0)
            centred, squares = centred + (s,), squares + (s * s,)
        rstd = tl.rsqrt(tl.sum(_added(squares, PARTS), axis=1) / N + eps)
        for part in tl.static_range(PARTS):
            col, inside = _part(part, row_inside, N, BLOCK_N // PARTS)
            _finish(y_ptr, weight_ptr, bias_ptr, centred[part] * rstd[:, None], row, col, inside, N)
    if mean_ptr is not None:
        tl.store(mean_ptr + row, mean, mask=row_inside)
        tl.store(rstd_ptr + row, rstd, mask=row_inside)


def layer_norm_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, N: int, eps: float, *,
    dtype: torch.dtype | None = None, keep_sum: bool = True, keep: bool = True, settings: RowSettings | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
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
    x, residual = rows_of(x, N), None if residual is None else rows_of(residual, N)
    arrays = 2 + (residual is not None) + (s is not None)
    gpu = chip_of(x)
    settings = settings or forward_choice(gpu, Rows(rows, N, x.element_size(), arrays))
    grain = grain_of(N, x, residual)
    with on_device_of(x):
        layer_norm_forward_kernel[(cdiv(rows, settings.BLOCK_ROWS),)](
            y, s, mean, rstd, x, residual, vector_of(weight), vector_of(bias),
            x.stride(0) // grain, 0 if residual is None else residual.stride(0) // grain, rows, N // grain, eps,
            _TL[sum_dtype], N > settings.BLOCK_N, grain, settings.BLOCK_ROWS, settings.BLOCK_N,
            forward_parts(gpu, settings, x.element_size()), num_warps=settings.num_warps,
        )  # fmt: skip
    return y, s, mean, rstd
