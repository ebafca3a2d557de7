"""Max-pooling over windows of an image, and its gradient by gather.

    y[n, c, p, q]  = max over i < KH, j < KW of x[n, c, p SH - PH + i DH, q SW - PW + j DW]      padding is -inf
    dx[n, c, h, w] = sum of dy[n, c, p, q] over the windows (p, q) whose winner is x[n, c, h, w]

Legend: N images, C channels, H x W input pixels, OH x OW output pixels; kernel K, stride S, padding P, dilation D.
Of equal values the first in the window wins, of several NaN the last, as in PyTorch. Values are copied, never rounded.

A tile is (rows, columns): pixels x channels where channels are adjacent in memory, image lines x their pixels
elsewhere. What a kernel reads may have any strides. For the backward the forward keeps which element of its window won,
in one byte for windows of up to 256 elements.

The backward's pixels come in cells of SH x SW. Line a SH + r - PH, with r < SH, is element i of window
a + (r - i DH) / SH wherever that is an integer, which does not depend on a: the pixels at one place of all cells meet
the same elements of windows, and no pixel looks at a window that does not hold it. No atomics, two runs are bitwise
equal; sums in float32, in the order of the windows, rounded once.

Comparisons: KH KW per output. Traffic: the forward reads x and writes y and, before a backward, the positions; the
backward reads dy and the positions and writes dx. Windows that overlap meet in the caches.
"""

import math

import torch
import triton
import triton.language as tl

from .entry import entry
from .launch import cdiv, chip_of, on_device_of
from .tile_settings import Grid, TileSettings, tile_choice

_UNROLL = 16  # windows, and cells, of up to so many elements are unrolled; half as long lines of larger windows too


@triton.jit
def _tile(
    pid, rows, cols, C, H, W,
    CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Tile ``pid`` of a grid (N, C, H, W) -> n, c, h, w, each a row or a column of the tile; which are in the grid."""
    INDEX: tl.constexpr = tl.int64 if LARGE else tl.int32
    tiles = tl.cdiv(cols, BLOCK_COLS)
    row = (pid // tiles).to(INDEX) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    col = (pid % tiles * BLOCK_COLS).to(INDEX) + tl.arange(0, BLOCK_COLS)[None, :]
    inside = (row < rows) & (col < cols)
    row = tl.minimum(row, rows - 1)  # no offset outside overflows
    if CHANNELS_LAST:
        line = row // W
        n, c, h, w = line // H, col, line % H, row % W
    else:
        plane = row // H
        n, c, h, w = plane // C, plane % C, row % H, col
    return n, c, h, w, inside


@triton.jit
def _offset(n, c, h, w, C, H, W, CHANNELS_LAST: tl.constexpr):
    """Where an element of a dense (N, C, H, W) lies."""
    if CHANNELS_LAST:
        offset = ((n * H + h) * W + w) * C + c
    else:
        offset = ((n * C + c) * H + h) * W + w
    return offset


@entry
def _forward_kernel(
    y_ptr, kept_ptr, indices_ptr,  # dense (N, C, OH, OW) in the layout of x; the last two may be None
    x_ptr,  # (N, C, H, W)
    stride_n, stride_c, stride_h, stride_w,  # of x, in elements
    C, H, W, OH, OW, rows, cols,  # rows * cols = N * C * OH * OW
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    PAST_H: tl.constexpr, PAST_W: tl.constexpr,  # whether a window reaches past the last line, column
    CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, UNROLL_H: tl.constexpr, UNROLL_W: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """One program: a tile of outputs."""
    n, c, p, q, inside = _tile(tl.program_id(0), rows, cols, C, OH, OW, CHANNELS_LAST, LARGE, BLOCK_ROWS, BLOCK_COLS)
    offsets = _offset(n, c, p, q, C, OH, OW, CHANNELS_LAST)
    top, left = p * SH - PH, q * SW - PW
    x_ptr += n * stride_n + top * stride_h + (c * stride_c + left * stride_w)

    best = tl.full((BLOCK_ROWS, BLOCK_COLS), float("-inf"), dtype=tl.float32)
    # Where nothing exceeds -inf, the first element that is not padding wins
    skip_h, skip_w = tl.maximum(DH - 1 - top, 0) // DH, tl.maximum(DW - 1 - left, 0) // DW
    kept = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.int32) + (skip_h * KW + skip_w).to(tl.int32)
    for i in tl.range(KH, loop_unroll_factor=UNROLL_H):
        h = top + i * DH
        line_there = inside
        if PH > 0:
            line_there = line_there & (h >= 0)
        if PAST_H:
            line_there = line_there & (h < H)
        line_ptr = x_ptr + tl.cast(i * DH, tl.int64) * stride_h
        for j in tl.range(KW, loop_unroll_factor=UNROLL_W):
            w = left + j * DW
            there = line_there
            if PW > 0:
                there = there & (w >= 0)
            if PAST_W:
                there = there & (w < W)
            x = tl.load(line_ptr + tl.cast(j * DW, tl.int64) * stride_w, mask=there, other=float("-inf")).to(tl.float32)
            wins = (x > best) | (x != x)  # not maximum: it drops NaN, and says nothing of the position
            best = tl.where(wins, x, best)
            kept = tl.where(wins, i * KW + j, kept)

    tl.store(y_ptr + offsets, best.to(y_ptr.dtype.element_ty), mask=inside)  # exact
    if kept_ptr is not None:
        tl.store(kept_ptr + offsets, kept.to(kept_ptr.dtype.element_ty), mask=inside)
    if indices_ptr is not None:
        h, w = top + kept // KW * DH, left + kept % KW * DW
        tl.store(indices_ptr + offsets, h.to(tl.int64) * W + w, mask=inside)


@triton.jit
def _window(
    kept_ptr, dy_ptr, a, b, up, before, inside,  # pointers and numbers of the windows (a, b)
    stride_h, stride_w, C, OH, OW, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Winners and gradients of the windows (a - up, b - before); 0 where there is none."""
    there = inside & (a >= up) & (a < OH + up) & (b >= before) & (b < OW + before)
    back = tl.cast(up, tl.int64) * OW + before
    kept = tl.load(kept_ptr - (back * C if CHANNELS_LAST else back), mask=there, other=0)
    dy_ptr -= tl.cast(up, tl.int64) * stride_h + tl.cast(before, tl.int64) * stride_w
    return kept, tl.load(dy_ptr, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _store(dx_ptr, dx, n, c, h, w, inside, C, H, W, CHANNELS_LAST: tl.constexpr):
    """Pixels of cells, where they are in the image."""
    there = inside & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    tl.store(dx_ptr + _offset(n, c, h, w, C, H, W, CHANNELS_LAST), dx.to(dx_ptr.dtype.element_ty), mask=there)


@entry
def _backward_kernel(
    dx_ptr,  # dense (N, C, H, W)
    dy_ptr, kept_ptr,  # (N, C, OH, OW); kept is dense in the layout of dx
    stride_n, stride_c, stride_h, stride_w,  # of dy, in elements
    C, H, W, OH, OW, cells_h, cells_w, rows, cols,  # rows * cols = N * C * cells_h * cells_w
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr,
    UNROLLED: tl.constexpr,  # a program has all pixels of its cells, else one of each
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """One program: a tile of cells; each of its pixels is the sum over the windows that it won."""
    PIXELS: tl.constexpr = SH * SW
    SPREAD_H: tl.constexpr = (KH - 1) * DH // SH  # a pixel of cell a is in windows a - SPREAD_H to a
    SPREAD_W: tl.constexpr = (KW - 1) * DW // SW
    pid = tl.program_id(0)
    n, c, a, b, inside = _tile(
        pid if UNROLLED else pid // PIXELS,
        rows, cols, C, cells_h, cells_w, CHANNELS_LAST, LARGE, BLOCK_ROWS, BLOCK_COLS,
    )  # fmt: skip
    dy_ptr += n * stride_n + a * stride_h + (c * stride_c + b * stride_w)
    kept_ptr += _offset(n, c, a, b, C, OH, OW, CHANNELS_LAST)

    if UNROLLED:
        dx = ()
        for _ in tl.static_range(PIXELS):
            dx = dx + (tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32),)
        for up in tl.static_range(SPREAD_H, -1, -1):
            for before in tl.static_range(SPREAD_W, -1, -1):
                kept, dy = _window(
                    kept_ptr, dy_ptr, a, b, up, before, inside, stride_h, stride_w, C, OH, OW, CHANNELS_LAST
                )
                for pixel in tl.static_range(PIXELS):
                    at_h, at_w = pixel // SW + up * SH, pixel % SW + before * SW  # from the window's first element
                    if at_h % DH == 0 and at_h // DH < KH and at_w % DW == 0 and at_w // DW < KW:
                        won = kept == at_h // DH * KW + at_w // DW
                        dx = dx[:pixel] + (dx[pixel] + tl.where(won, dy, 0.0),) + dx[pixel + 1 :]
        for pixel in tl.static_range(PIXELS):
            _store(
                dx_ptr, dx[pixel], n, c, a * SH + (pixel // SW - PH), b * SW + (pixel % SW - PW), inside,
                C, H, W, CHANNELS_LAST,
            )  # fmt: skip
    else:
        pixel = pid % PIXELS
        dx = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
        for up in range(SPREAD_H, -1, -1):
            at_h = pixel // SW + up * SH
            if (at_h % DH == 0) & (at_h // DH < KH):
                for before in range(SPREAD_W, -1, -1):
                    at_w = pixel % SW + before * SW
                    if (at_w % DW == 0) & (at_w // DW < KW):
                        kept, dy = _window(
                            kept_ptr, dy_ptr, a, b, up, before, inside, stride_h, stride_w, C, OH, OW, CHANNELS_LAST
                        )
                        dx += tl.where(kept == at_h // DH * KW + at_w // DW, dy, 0.0)
        _store(
            dx_ptr, dx, n, c, a * SH + (pixel // SW - PH), b * SW + (pixel % SW - PW), inside, C, H, W, CHANNELS_LAST
        )


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


def position_dtype(elements: int) -> torch.dtype:
    """The smallest dtype that numbers the elements of a window."""
    return torch.uint8 if elements <= 2**8 else torch.int16 if elements <= 2**15 else torch.int32


def _empty(x, height, width, dtype, channels_last):
    shape, layout = (*x.shape[:2], height, width), torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=layout)


forward_choice = tile_choice("max_pool2d_forward")
backward_choice = tile_choice("max_pool2d_backward")


def _grid(t, N, C, H, W, channels_last, settings, choice, reads):
    """A grid (N, C, H, W) of elements as those of ``t``, however it lies -> its rows, columns, settings, programs."""
    rows, cols = (N * H * W, C) if channels_last else (N * C * H, W)
    s = settings or choice(chip_of(t), Grid(rows, cols, t.element_size(), reads))
    return rows, cols, s, cdiv(rows, s.BLOCK_ROWS) * cdiv(cols, s.BLOCK_COLS)


def _large(numel, t):
    """Whether offsets need 64 bits: more elements than ``numel`` and a tile beside it, or ``t`` spans as many."""
    return max(numel, sum(n * stride for n, stride in zip(t.shape, t.stride(), strict=True))) > 2**30


def max_pool2d_fwd(x, kernel, stride, padding, dilation, size, keep, indices, settings: TileSettings | None = None):
    """x (N, C, H, W), any strides -> y (N, C, OH, OW), positions of the winners, int64 indices, each dense, or None.

    kernel, stride, padding, dilation: pairs; size: (OH, OW). keep: return the winner's position i * KW + j in its
    window; indices: return h * W + w of it.
    """
    channels_last = is_channels_last(x)
    y = _empty(x, *size, x.dtype, channels_last)
    elements = math.prod(kernel)
    kept = _empty(x, *size, position_dtype(elements), channels_last) if keep else None
    found = _empty(x, *size, torch.int64, channels_last) if indices else None
    if y.numel() == 0:
        return y, kept, found
    past = (
        (o - 1) * s - p + (k - 1) * d >= n
        for n, o, k, s, p, d in zip(x.shape[2:], size, kernel, stride, padding, dilation, strict=True)
    )
    few = elements <= _UNROLL
    unroll_h, unroll_w = kernel[0] if few else 1, kernel[1] if few or kernel[1] <= _UNROLL // 2 else 1
    rows, cols, s, programs = _grid(x, *y.shape, channels_last, settings, forward_choice, elements)
    with on_device_of(x):
        _forward_kernel[(programs,)](
            y, kept, found, x, *x.stride(), *x.shape[1:], *size, rows, cols,
            *kernel, *stride, *padding, *dilation, *past, channels_last, _large(y.numel(), x), unroll_h, unroll_w,
            s.BLOCK_ROWS, s.BLOCK_COLS, num_warps=s.num_warps,
        )  # fmt: skip
    return y, kept, found


def max_pool2d_bwd(dy, kept, kernel, stride, padding, dilation, size, settings: TileSettings | None = None):
    """dy (N, C, OH, OW), any strides; kept as the forward returns it; size: (H, W) -> dx (N, C, H, W)."""
    channels_last = is_channels_last(kept)
    dx = _empty(dy, *size, dy.dtype, channels_last)
    if dx.numel() == 0:
        return dx
    cells = [cdiv(n + p, s) for n, p, s in zip(size, padding, stride, strict=True)]
    pixels = math.prod(stride)
    unrolled = math.prod(kernel) <= _UNROLL and pixels <= _UNROLL
    rows, cols, s, programs = _grid(
        dy, *dy.shape[:2], *cells, channels_last, settings, backward_choice, math.prod(kernel)
    )
    with on_device_of(dy):
        _backward_kernel[(programs if unrolled else programs * pixels,)](
            dx, dy, kept, *dy.stride(), *dx.shape[1:], *dy.shape[2:], *cells, rows, cols,
            *kernel, *stride, *padding, *dilation, channels_last, _large(dx.numel(), dy), unrolled,
            s.BLOCK_ROWS, s.BLOCK_COLS, num_warps=s.num_warps,
        )  # fmt: skip
    return dx
