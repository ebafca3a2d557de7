"""Max-pooling over windows of an image, and its gradient by gather.

    y[n, c, p, q]  = max over i < KH, j < KW of x[n, c, p SH - PH + i DH, q SW - PW + j DW]      padding is -inf
    dx[n, c, h, w] = sum of dy[n, c, p, q] over the windows (p, q) whose winner is x[n, c, h, w]

Legend: N images, C channels, H x W input pixels, OH x OW output pixels; kernel K, stride S, padding P, dilation D.
Of equal values the first in the window wins, of several NaN the last, as in PyTorch. Values are copied, never rounded.

A tile is (rows, columns): pixels x channels where channels are adjacent in memory, image lines x strips elsewhere. A
strip is one pixel or, where lines allow it, as many side by side as move together: see lines.py. What a
kernel reads may have any strides. For the backward the forward keeps which element of its window won, in one byte for
windows of up to 256 elements.

The backward's pixels come in cells of SH x SW, the first of which starts with the image, or with the padding where a
cell meets fewer windows then. Line a SH + r of the cells, with r < SH, is element i of window a + (r + P - i DH) / SH
wherever that is an integer, P being the padding before the cells. This does not depend on a: the pixels at one place of
all cells meet the same elements of windows, and no pixel looks at a window that does not hold it. No atomics, two runs
are bitwise equal; sums in float32, in the order of the windows, rounded once.

Comparisons: KH KW per output. Traffic: the forward reads x and writes y and, before a backward, the positions; the
backward reads dy and the positions and writes dx. Windows that overlap meet in the caches.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import cdiv, chip_of, on_device_of
from ..launch.entry import entry
from ..tile_settings import Grid, GridSettings, grid_choice
from .lines import dense_offset, grain, grid_tile, line_of, load_line, store_line, strip_width, within

_HELD = 32  # values of a strip that a thread holds
_UNROLL = 16  # windows, and cells, of up to so many elements are unrolled; half as long lines of larger windows too


@triton.jit
def _float32(x):
    """The same numbers. bfloat16 is widened by hand: LLVM would compare it in packed pairs, with more instructions."""
    if x.dtype == tl.bfloat16:
        wide = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def _compare(x, position, best, kept):
    """The winner so far and its position, once ``x`` at ``position`` took part."""
    x = _float32(x)
    wins = (x > best) | (x != x)  # not maximum: it drops NaN, and says nothing of the position
    return tl.where(wins, x, best), tl.where(wins, position, kept)


@entry
def max_pool2d_forward_kernel(
    y_ptr, kept_ptr, indices_ptr,  # dense (N, C, OH, OW) in the layout of x; the last two may be None
    x_ptr,  # (N, C, H, W)
    stride_n, stride_c, stride_h, stride_w,  # of x, in elements
    C, H, W, OH, OW, rows, cols,  # rows * cols * STRIP = N * C * OH * OW
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    PAST_H: tl.constexpr, PAST_W: tl.constexpr,  # whether a window reaches past the last line, column
    CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr,
    UNROLL_H: tl.constexpr, UNROLL_W: tl.constexpr,  # so many lines of a window at once; whether all of a line
    STRIP: tl.constexpr, GRAIN: tl.constexpr,  # outputs side by side in one place of a tile; elements of x in one load
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """One program: a tile of strips of outputs."""
    n, c, p, q, inside = grid_tile(
        tl.program_id(0), rows, cols, C, OH, OW, CHANNELS_LAST, LARGE, BLOCK_ROWS, BLOCK_COLS
    )
    q = q * STRIP
    offsets = dense_offset(n, c, p, q, C, OH, OW, CHANNELS_LAST)
    top, left = p * SH - PH, q * SW  # of the windows, the latter without the padding
    x_ptr += n * stride_n + top * stride_h + (c * stride_c + left * stride_w)

    # Where nothing exceeds -inf, the first element that is not padding wins
    skip_h = tl.maximum(DH - 1 - top, 0) // DH
    best, kept = (), ()
    for v in tl.static_range(STRIP):
        first = skip_h * KW
        if v * SW < PW:
            first += tl.maximum(DW - 1 + PW - v * SW - left, 0) // DW
        best = best + (tl.full((BLOCK_ROWS, BLOCK_COLS), float("-inf"), dtype=tl.float32),)
        kept = kept + (tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.int32) + first.to(tl.int32),)

    for i in tl.range(KH, loop_unroll_factor=UNROLL_H):
        there = within(top + i * DH, H, inside, PH > 0, PAST_H)
        line_ptr = x_ptr + tl.cast(i * DH, tl.int64) * stride_h
        if UNROLL_W:
            line = load_line(
                line_ptr, stride_w, left, W, there,
                -PW, DW, (STRIP - 1) * SW + KW, STRIP * SW, GRAIN, PAST_W, float("-inf"),
            )  # fmt: skip
            for v in tl.static_range(STRIP):
                for j in tl.static_range(KW):
                    x, position = _compare(line[v * SW + j], i * KW + j, best[v], kept[v])
                    best, kept = best[:v] + (x,) + best[v + 1 :], kept[:v] + (position,) + kept[v + 1 :]
        else:
            for j in range(KW):
                pixel_there = within(left + (j * DW - PW), W, there, PW > 0, PAST_W)
                pixel_ptr = line_ptr + tl.cast(j * DW - PW, tl.int64) * stride_w
                pixel = tl.load(pixel_ptr, mask=pixel_there, other=float("-inf"))
                x, position = _compare(pixel, i * KW + j, best[0], kept[0])
                best, kept = (x,), (position,)

    store_line(y_ptr + offsets, 1, best, q, OW, inside, STRIP, STRIP, False, False)  # exact
    if kept_ptr is not None:
        store_line(kept_ptr + offsets, 1, kept, q, OW, inside, STRIP, STRIP, False, False)
    if indices_ptr is not None:
        found = ()
        for v in tl.static_range(STRIP):
            h, w = top + kept[v] // KW * DH, left + (v * SW - PW) + kept[v] % KW * DW
            found = found + (h.to(tl.int64) * W + w,)
        store_line(indices_ptr + offsets, 1, found, q, OW, inside, STRIP, 1 if STRIP == 1 else 2, False, False)


@entry
def max_pool2d_backward_kernel(
    dx_ptr,  # dense (N, C, H, W)
    dy_ptr, kept_ptr,  # (N, C, OH, OW); kept is dense in the layout of dx
    stride_n, stride_c, stride_h, stride_w,  # of dy, in elements
    C, H, W, OH, OW, cells_h, cells_w, rows, cols,  # rows * cols * STRIP = N * C * cells_h * cells_w
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    START_H: tl.constexpr, START_W: tl.constexpr,  # padding in the first cell; PH, PW: that before it
    CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr,
    UNROLLED: tl.constexpr,  # a program has all pixels of its cells, else one of each
    STRIP: tl.constexpr, GRAIN: tl.constexpr,  # cells side by side in one place of a tile; pixels in one store
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """One program: a tile of strips of cells; each of its pixels is the sum over the windows that it won."""
    PIXELS: tl.constexpr = SH * SW
    # A pixel of cell a is in windows a - LAST to a - FIRST
    FIRST_H: tl.constexpr = -((SH - 1 + PH) // SH)
    FIRST_W: tl.constexpr = -((SW - 1 + PW) // SW)
    LAST_H: tl.constexpr = ((KH - 1) * DH - PH) // SH
    LAST_W: tl.constexpr = ((KW - 1) * DW - PW) // SW
    COUNT: tl.constexpr = STRIP + LAST_W - FIRST_W
    pid = tl.program_id(0)
    n, c, a, b, inside = grid_tile(
        pid if UNROLLED else pid // PIXELS,
        rows, cols, C, cells_h, cells_w, CHANNELS_LAST, LARGE, BLOCK_ROWS, BLOCK_COLS,
    )  # fmt: skip
    b = b * STRIP
    dy_ptr += n * stride_n + a * stride_h + (c * stride_c + b * stride_w)
    kept_ptr += dense_offset(n, c, a, b, C, OH, OW, CHANNELS_LAST)
    column = C if CHANNELS_LAST else 1  # elements from one to the next, where dense
    top, left = a * SH - START_H, b * SW - START_W
    dx_ptr += dense_offset(n, c, top, left, C, H, W, CHANNELS_LAST)

    if UNROLLED:
        dx = ()
        for _ in tl.static_range(PIXELS * STRIP):
            dx = dx + (tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32),)
        for up in tl.static_range(LAST_H, FIRST_H - 1, -1):
            there = within(a - up, OH, inside, up > 0, True)
            line_ptr = dy_ptr - tl.cast(up, tl.int64) * stride_h
            dy = load_line(line_ptr, stride_w, b, OW, there, -LAST_W, 1, COUNT, STRIP, STRIP, True, 0.0)
            line_ptr = kept_ptr - tl.cast(up, tl.int64) * OW * column
            kept = load_line(line_ptr, column, b, OW, there, -LAST_W, 1, COUNT, STRIP, STRIP, True, 0)
            for pixel in tl.static_range(PIXELS * STRIP):
                for before in tl.static_range(LAST_W, FIRST_W - 1, -1):
                    # From the window's first element
                    at_h, at_w = pixel // (SW * STRIP) + PH + up * SH, pixel % SW + PW + before * SW
                    if at_h >= 0 and at_h % DH == 0 and at_h // DH < KH:
                        if at_w >= 0 and at_w % DW == 0 and at_w // DW < KW:
                            won = kept[pixel // SW % STRIP + LAST_W - before] == at_h // DH * KW + at_w // DW
                            share = tl.where(won, dy[pixel // SW % STRIP + LAST_W - before].to(tl.float32), 0.0)
                            dx = dx[:pixel] + (dx[pixel] + share,) + dx[pixel + 1 :]
        for r in tl.static_range(SH):
            line = dx[r * SW * STRIP : (r + 1) * SW * STRIP]
            line_ptr = dx_ptr + tl.cast(r, tl.int64) * W * column
            there = within(top + r, H, inside, START_H > 0, True)
            store_line(line_ptr, column, line, left, W, there, SW * STRIP, GRAIN, START_W > 0, True)
    else:
        pixel = pid % PIXELS
        r, s = pixel // SW, pixel % SW
        dx = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
        for up in range(LAST_H, FIRST_H - 1, -1):
            at_h = r + PH + up * SH
            if (at_h >= 0) & (at_h % DH == 0) & (at_h // DH < KH):
                there = within(a - up, OH, inside, True, True)
                for before in range(LAST_W, FIRST_W - 1, -1):
                    at_w = s + PW + before * SW
                    if (at_w >= 0) & (at_w % DW == 0) & (at_w // DW < KW):
                        window_there = within(b - before, OW, there, True, True)
                        at = kept_ptr - (tl.cast(up, tl.int64) * OW + before) * column
                        kept = tl.load(at, mask=window_there, other=0)
                        at = dy_ptr - (tl.cast(up, tl.int64) * stride_h + tl.cast(before, tl.int64) * stride_w)
                        dy = tl.load(at, mask=window_there, other=0.0).to(tl.float32)
                        dx += tl.where(kept == at_h // DH * KW + at_w // DW, dy, 0.0)
        there = within(left + s, W, within(top + r, H, inside, START_H > 0, True), START_W > 0, True)
        tl.store(dx_ptr + (tl.cast(r, tl.int64) * W + s) * column, dx.to(dx_ptr.dtype.element_ty), mask=there)


def is_channels_last(x: Tensor) -> bool:
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


forward_choice = grid_choice("max_pool2d_forward")
backward_choice = grid_choice("max_pool2d_backward")


def _grid(t, N, C, H, W, channels_last, strip, settings, choice, reads):
    """A grid (N, C, H, W) of elements as those of ``t``, however it lies -> its rows, columns, settings, programs."""
    rows, cols = (N * H * W, C) if channels_last else (N * C * H, W)
    settings = settings or choice(chip_of(t), Grid(rows, cols, t.element_size(), reads, channels_last or strip > 1))
    return rows, cols, settings, cdiv(rows, settings.BLOCK_ROWS) * cdiv(cols, settings.BLOCK_COLS)


def _large(numel, t):
    """Whether offsets need 64 bits: more elements than ``numel`` and a tile beside it, or ``t`` spans as many."""
    return max(numel, sum(n * stride for n, stride in zip(t.shape, t.stride(), strict=True))) > 2**30


def _most(settings: GridSettings, t, held: int) -> int:
    """Elements of a result like ``t`` that may stand side by side in one place of a tile, with ``held`` values each."""
    of_a_thread = settings.BLOCK_ROWS * settings.BLOCK_COLS // (32 * settings.num_warps)
    most = max(1, min(16 // t.element_size(), _HELD // held, settings.BLOCK_COLS, of_a_thread))
    return 1 << (most.bit_length() - 1)


def max_pool2d_fwd(
    x: Tensor, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int],
    size: tuple[int, int], keep: bool, indices: bool, settings: GridSettings | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
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
    unroll_h, unroll_w = kernel[0] if few else 1, few or kernel[1] <= _UNROLL // 2
    strip, line = 1, line_of(x)
    if unroll_w and not channels_last and dilation[1] == 1:
        strip = strip_width(size[1], (line, stride[1]), (line_of(y), 1))
    rows, cols, settings, programs = _grid(x, *y.shape, channels_last, strip, settings, forward_choice, elements)
    strip = min(strip, _most(settings, x, stride[1]))
    move = grain(line, strip * stride[1]) if strip > 1 else 1
    with on_device_of(x):
        max_pool2d_forward_kernel[(programs,)](
            y, kept, found, x, *x.stride(), *x.shape[1:], *size, rows, cols // strip,
            *kernel, *stride, *padding, *dilation, *past, channels_last, _large(y.numel(), x), unroll_h, unroll_w,
            strip, move, settings.BLOCK_ROWS, settings.BLOCK_COLS // strip, num_warps=settings.num_warps,
        )  # fmt: skip
    return y, kept, found


def _start(kernel: int, stride: int, padding: int, dilation: int) -> int:
    """How much of the padding the first cell holds: none, or all where a cell then meets fewer windows."""
    windows = lambda outside: ((kernel - 1) * dilation - outside) // stride + (stride - 1 + outside) // stride  # noqa: E731
    return padding if windows(0) < windows(padding) else 0


def max_pool2d_bwd(
    dy: Tensor, kept: Tensor, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int],
    dilation: tuple[int, int], size: tuple[int, int], settings: GridSettings | None = None,
) -> Tensor:  # fmt: skip
    """dy (N, C, OH, OW), any strides; kept as the forward returns it; size: (H, W) -> dx (N, C, H, W)."""
    channels_last = is_channels_last(kept)
    dx = _empty(dy, *size, dy.dtype, channels_last)
    if dx.numel() == 0:
        return dx
    pixels = math.prod(stride)
    unrolled = math.prod(kernel) <= _UNROLL and pixels <= _UNROLL
    start = [_start(*axis) for axis in zip(kernel, stride, padding, dilation, strict=True)]
    strip, line = 1, line_of(dx)
    if unrolled and not channels_last:
        strip = strip_width(cdiv(size[1], stride[1]), (line, stride[1]), (line_of(dy), 1), (line_of(kept), 1))
    if strip > 1:
        start[1] = 0  # strips start where lines do
    cells = [cdiv(n + first, s) for n, first, s in zip(size, start, stride, strict=True)]
    outside = [p - first for p, first in zip(padding, start, strict=True)]
    rows, cols, settings, programs = _grid(
        dy, *dy.shape[:2], *cells, channels_last, strip, settings, backward_choice, math.prod(kernel)
    )
    strip = min(strip, _most(settings, dy, pixels))
    move = grain(line, strip * stride[1]) if strip > 1 else 1
    with on_device_of(dy):
        max_pool2d_backward_kernel[(programs if unrolled else programs * pixels,)](
            dx, dy, kept, *dy.stride(), *dx.shape[1:], *dy.shape[2:], *cells, rows, cols // strip,
            *kernel, *stride, *outside, *dilation, *start, channels_last, _large(dx.numel(), dy), unrolled,
            strip, move, settings.BLOCK_ROWS, settings.BLOCK_COLS // strip, num_warps=settings.num_warps,
        )  # fmt: skip
    return dx
