"""Max-pooling over windows of an image, and its gradient by gather.

    y[n, c, p, q]  = max over i < KH, j < KW of x[n, c, p SH - PH + i DH, q SW - PW + j DW]      padding is -inf
    dx[n, c, h, w] = sum of dy[n, c, p, q] over the windows (p, q) whose winner is x[n, c, h, w]

Legend: N images, C channels, H x W input pixels, OH x OW output pixels; kernel K, stride S, padding P, dilation D.
Of equal values the first in the window wins, of several NaN the last, as in PyTorch. Values are copied, never rounded.

A program owns a tile (rows, columns) of the tensor it writes: pixels x channels where channels are adjacent in memory,
image lines x their pixels elsewhere. The tensor that is read may have any strides.

For the backward the forward keeps which element of its window won, in one byte for windows of up to 256 elements. Line
h is in the windows p with h + PH = p SH + i DH for an i < KH. With g = gcd(SH, DH) those i are SH/g apart, so there are
at most ceil(KH g / SH) of them: the backward finds the first by arithmetic and looks at no other window. No atomics,
two runs are bitwise equal; sums in float32, in the order of the windows, rounded once.

Comparisons: KH KW per output. Traffic: the forward reads x and writes y and, before a backward, the positions; the
backward reads dy and the positions and writes dx. Windows that overlap meet in the caches.
"""

import math

import torch
import triton
import triton.language as tl

from .launch import TileSettings, cdiv, chip, on_device_of, tile_settings

_UNROLL = 16  # windows of up to so many elements are unrolled


@triton.jit
def _digits(whole, part, base):
    """The number whole + part in ``base``: its last digit, and the rest, again as a scalar int64 and a small tile."""
    low = (whole % base).to(tl.int32) + part
    return whole // base, low // base, low % base


@triton.jit
def _elements(rows, cols, C, H, W, CHANNELS_LAST: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """This program's tile of a dense (N, C, H, W) -> n, c, h, w, each a row or a column of the tile; offset, inside."""
    tiles = tl.cdiv(cols, BLOCK_COLS)
    first = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_ROWS
    part = tl.arange(0, BLOCK_ROWS)[:, None]
    row, col = first + part, tl.program_id(0) % tiles * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    if CHANNELS_LAST:
        c = col
        first, part, w = _digits(first, part, W)
        first, part, h = _digits(first, part, H)
    else:
        w = col
        first, part, h = _digits(first, part, H)
        first, part, c = _digits(first, part, C)
    return first + part, c, h, w, row * cols + col, (row < rows) & (col < cols)


@triton.jit
def _forward_kernel(
    y_ptr, kept_ptr, indices_ptr,  # dense (N, C, OH, OW) in the layout of x; the last two may be None
    x_ptr,  # (N, C, H, W)
    stride_n, stride_c, stride_h, stride_w,  # of x, in elements
    C, H, W, OH, OW, rows, cols,  # rows * cols = N * C * OH * OW
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    WHOLE: tl.constexpr,  # no window reaches past the image
    CHANNELS_LAST: tl.constexpr, UNROLL_H: tl.constexpr, UNROLL_W: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """One program: a tile of outputs."""
    n, c, oh, ow, offsets, inside = _elements(rows, cols, C, OH, OW, CHANNELS_LAST, BLOCK_ROWS, BLOCK_COLS)
    top, left = oh * SH - PH, ow * SW - PW
    x_ptr += n * stride_n + top.to(tl.int64) * stride_h + (c.to(tl.int64) * stride_c + left.to(tl.int64) * stride_w)

    best = tl.full((BLOCK_ROWS, BLOCK_COLS), float("-inf"), dtype=x_ptr.dtype.element_ty)
    # Where nothing exceeds -inf, the first element that is not padding wins
    skip_h, skip_w = tl.maximum(DH - 1 - top, 0) // DH, tl.maximum(DW - 1 - left, 0) // DW
    kept = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.int32) + (skip_h * KW + skip_w)
    for i in tl.range(KH, loop_unroll_factor=UNROLL_H):
        h = top + i * DH
        down = tl.cast(i * DH, tl.int64) * stride_h
        for j in tl.range(KW, loop_unroll_factor=UNROLL_W):
            w = left + j * DW
            there = inside
            if not WHOLE:
                there = inside & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            x = tl.load(x_ptr + (down + tl.cast(j * DW, tl.int64) * stride_w), mask=there, other=float("-inf"))
            wins = (x > best) | (x != x)  # not maximum: it drops NaN, and says nothing of the position
            best = tl.where(wins, x, best)
            kept = tl.where(wins, i * KW + j, kept)

    tl.store(y_ptr + offsets, best, mask=inside)
    if kept_ptr is not None:
        tl.store(kept_ptr + offsets, kept.to(kept_ptr.dtype.element_ty), mask=inside)
    if indices_ptr is not None:
        h, w = top + kept // KW * DH, left + kept % KW * DW
        tl.store(indices_ptr + offsets, h.to(tl.int64) * W + w, mask=inside)


@triton.jit
def _first_window(
    at, K: tl.constexpr, S: tl.constexpr, D: tl.constexpr,
    SHARED: tl.constexpr, STEP: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """Smallest i >= 0 for which at = p S + i D with an integer p, and that p; i = K where there is none.

    SHARED = gcd(S, D), STEP = S / SHARED, INVERSE that of D / SHARED modulo STEP.
    """
    i = at // SHARED % STEP * INVERSE % STEP
    return tl.where(at % SHARED == 0, i, K), (at - i * D) // S


@triton.jit
def _backward_kernel(
    dx_ptr,  # dense (N, C, H, W)
    dy_ptr, kept_ptr,  # (N, C, OH, OW); kept is dense in the layout of dx
    stride_n, stride_c, stride_h, stride_w,  # of dy, in elements
    C, H, W, OH, OW, rows, cols,  # rows * cols = N * C * H * W
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    SHARED_H: tl.constexpr, STEP_H: tl.constexpr, INVERSE_H: tl.constexpr, WINDOWS_H: tl.constexpr,
    SHARED_W: tl.constexpr, STEP_W: tl.constexpr, INVERSE_W: tl.constexpr, WINDOWS_W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, UNROLL_H: tl.constexpr, UNROLL_W: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """One program: a tile of inputs, each the sum over the windows that it won."""
    n, c, h, w, offsets, inside = _elements(rows, cols, C, H, W, CHANNELS_LAST, BLOCK_ROWS, BLOCK_COLS)
    first_i, first_p = _first_window(h + PH, KH, SH, DH, SHARED_H, STEP_H, INVERSE_H)
    first_j, first_q = _first_window(w + PW, KW, SW, DW, SHARED_W, STEP_W, INVERSE_W)
    dy_ptr += n * stride_n + c.to(tl.int64) * stride_c
    kept_ptr += n * C * OH * OW + (c if CHANNELS_LAST else c.to(tl.int64) * OH * OW)

    dx = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
    for back_h in tl.range(WINDOWS_H, loop_unroll_factor=UNROLL_H):
        earlier_h = WINDOWS_H - 1 - back_h  # the window that comes first in memory is added first
        i, p = first_i + earlier_h * STEP_H, first_p - earlier_h * (DH // SHARED_H)
        holds_h = (i < KH) & (p >= 0) & (p < OH)
        for back_w in tl.range(WINDOWS_W, loop_unroll_factor=UNROLL_W):
            earlier_w = WINDOWS_W - 1 - back_w
            j, q = first_j + earlier_w * STEP_W, first_q - earlier_w * (DW // SHARED_W)
            there = inside & holds_h & (j < KW) & (q >= 0) & (q < OW)
            window = p.to(tl.int64) * OW + q
            kept = tl.load(kept_ptr + (window * C if CHANNELS_LAST else window), mask=there, other=0)
            at = p.to(tl.int64) * stride_h + q.to(tl.int64) * stride_w
            dy = tl.load(dy_ptr + at, mask=there, other=0.0)
            dx += tl.where(kept == i * KW + j, dy.to(tl.float32), 0.0)  # not a product: 0 * inf is NaN
    tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)


def is_channels_last(x) -> bool:
    """Whether PyTorch gives results made from ``x`` (N, C, H, W) the channels_last layout: c10's rule of strides."""
    (N, C, H, W), (n, c, h, w) = x.shape, x.stride()
    if c == 0 or 0 in (N, C, H, W):
        return False
    least = 0
    for size, stride in ((C, c), (W, w), (H, h)):
        if stride < least:
            return False
        least = stride * size
    return n >= least and least != c  # all alike, of size 1: contiguous


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """Number of windows along one axis. ceil_mode: a partial last one counts if it starts before the end padding."""
    slack = size + 2 * padding - dilation * (kernel - 1) - 1
    count = (cdiv(slack, stride) if ceil_mode else slack // stride) + 1
    return count - 1 if ceil_mode and (count - 1) * stride >= size + padding else count


def _empty(x, height, width, dtype, channels_last):
    shape, layout = (*x.shape[:2], height, width), torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=layout)


def _grid(t, channels_last, settings):
    """Dense (N, C, H, W) -> rows and columns as a program sees them, settings, grid."""
    cols = t.shape[1] if channels_last else t.shape[3]
    rows = t.numel() // cols
    s = settings or tile_settings(chip(), cols, t.element_size())
    return rows, cols, s, (cdiv(rows, s.BLOCK_ROWS) * cdiv(cols, s.BLOCK_COLS),)


def _unroll(height, width):
    """How often the loops over a window's lines and its columns are unrolled."""
    return (height if height * width <= _UNROLL else 1), (width if width <= _UNROLL else 1)


def max_pool2d_fwd(x, kernel, stride, padding, dilation, size, keep, indices, settings: TileSettings | None = None):
    """x (N, C, H, W), any strides -> y (N, C, OH, OW), positions of the winners, int64 indices, each dense, or None.

    kernel, stride, padding, dilation: pairs; size: (OH, OW). keep: return the winner's position i * KW + j in its
    window; indices: return h * W + w of it.
    """
    channels_last = is_channels_last(x)
    y = _empty(x, *size, x.dtype, channels_last)
    elements = math.prod(kernel)
    smallest = torch.uint8 if elements <= 2**8 else torch.int16 if elements <= 2**15 else torch.int32
    kept = _empty(x, *size, smallest, channels_last) if keep else None
    found = _empty(x, *size, torch.int64, channels_last) if indices else None
    if y.numel() == 0:
        return y, kept, found
    whole = all(
        p == 0 and (o - 1) * s + (k - 1) * d < n
        for n, o, k, s, p, d in zip(x.shape[2:], size, kernel, stride, padding, dilation, strict=True)
    )
    rows, cols, s, grid = _grid(y, channels_last, settings)
    with on_device_of(x):
        _forward_kernel[grid](
            y, kept, found, x, *x.stride(), *x.shape[1:], *size, rows, cols,
            *kernel, *stride, *padding, *dilation, whole, channels_last, *_unroll(*kernel),
            s.BLOCK_ROWS, s.BLOCK_COLS, num_warps=s.num_warps,
        )  # fmt: skip
    return y, kept, found


def max_pool2d_bwd(dy, kept, kernel, stride, padding, dilation, size, settings: TileSettings | None = None):
    """dy (N, C, OH, OW), any strides; kept as the forward returns it; size: (H, W) -> dx (N, C, H, W)."""
    channels_last = is_channels_last(kept)
    dx = _empty(dy, *size, dy.dtype, channels_last)
    if dx.numel() == 0:
        return dx
    search, windows = [], []
    for k, s, d in zip(kernel, stride, dilation, strict=True):
        shared = math.gcd(s, d)
        step = s // shared
        windows.append(cdiv(k, step))
        search += [shared, step, pow(d // shared, -1, step), windows[-1]]
    rows, cols, s, grid = _grid(dx, channels_last, settings)
    with on_device_of(dy):
        _backward_kernel[grid](
            dx, dy, kept, *dy.stride(), *dx.shape[1:], *dy.shape[2:], rows, cols,
            *kernel, *stride, *padding, *dilation, *search, channels_last, *_unroll(*windows),
            s.BLOCK_ROWS, s.BLOCK_COLS, num_warps=s.num_warps,
        )  # fmt: skip
    return dx
