"""Tiles of images, and lines of them whose neighbours in memory move together: parts of max_pool2d.

A tile (rows, strips) holds one element of each strip of adjacent columns, strips side by side. Columns of a strip that
lie in one piece of GRAIN elements are one load or store; a thread has all of a piece, so taking it apart or putting it
together moves nothing.
"""

import functools
import math

import triton
import triton.language as tl
from torch import Tensor

_BYTES = 16  # that one load or store moves at most


@triton.jit
def grid_tile(
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
def dense_offset(n, c, h, w, C, H, W, CHANNELS_LAST: tl.constexpr):
    """Where an element of a dense (N, C, H, W) lies."""
    if CHANNELS_LAST:
        offset = ((n * H + h) * W + w) * C + c
    else:
        offset = ((n * C + c) * H + h) * W + w
    return offset


@triton.jit
def _apart(piece, N: tl.constexpr):
    """(rows, strips, N) -> N tiles (rows, strips)."""
    if N == 1:
        tiles = (piece.reshape(piece.shape[0], piece.shape[1]),)
    else:
        left, right = tl.split(piece.reshape(piece.shape[0], piece.shape[1], 2, N // 2).permute(0, 1, 3, 2))
        tiles = _apart(left, N // 2) + _apart(right, N // 2)
    return tiles


@triton.jit
def _together(tiles, N: tl.constexpr):
    """The inverse."""
    if N == 1:
        piece = tiles[0][:, :, None]
    else:
        left, right = _together(tiles[: N // 2], N // 2), _together(tiles[N // 2 :], N // 2)
        piece = tl.join(left, right).permute(0, 1, 3, 2).reshape(left.shape[0], left.shape[1], N)
    return piece


@triton.jit
def _piece(ptr, N: tl.constexpr):
    """Pointers to the first elements of pieces -> to all; each piece starts at a multiple of its size."""
    BYTES: tl.constexpr = N * ptr.dtype.element_ty.primitive_bitwidth // 8
    return tl.multiple_of(ptr[:, :, None] + tl.arange(0, N)[None, None, :], [1, 1, BYTES])


@triton.jit
def within(at, size, inside, BEFORE: tl.constexpr, PAST: tl.constexpr):
    """Whether lines or columns are in the image; BEFORE, PAST: whether they may lie before the first, past the last."""
    if BEFORE:
        inside = inside & (at >= 0)
    if PAST:
        inside = inside & (at < size)
    return inside


@triton.jit
def _load(ptr, stride, w, W, inside, COL: tl.constexpr, N: tl.constexpr, PAST: tl.constexpr, OTHER: tl.constexpr):
    """N tiles: the columns from w + COL on, which are all in the image or all beside it."""
    ptr += tl.cast(COL, tl.int64) * stride
    inside = within(w + COL, W, inside, COL < 0, PAST)
    if N == 1:
        tiles = (tl.load(ptr, mask=inside, other=OTHER),)
    else:
        tiles = _apart(tl.load(_piece(ptr, N), mask=inside[:, :, None], other=OTHER), N)
    return tiles


@triton.jit
def load_line(
    ptr, stride, w, W, inside,  # pointers to columns w of lines; between columns, in elements; width of the image
    FIRST: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr, SPAN: tl.constexpr, GRAIN: tl.constexpr,
    PAST: tl.constexpr,  # whether a column may lie past the last
    OTHER: tl.constexpr,  # where there is no column
):  # fmt: skip
    """COUNT tiles: the columns w + FIRST, w + FIRST + STEP, ... of lines; w are multiples of SPAN.

    Of the SPAN columns from w on, pieces are read whole that are needed in part. A step of more than 1 has no pieces.
    """
    line = ()
    for j in tl.static_range(COUNT):
        if j >= len(line):
            if (FIRST + j) % GRAIN == 0 and (j + GRAIN <= COUNT or (FIRST + j >= 0 and FIRST + j < SPAN)):
                line = line + _load(ptr, stride, w, W, inside, FIRST + j * STEP, GRAIN, PAST, OTHER)
            else:
                line = line + _load(ptr, stride, w, W, inside, FIRST + j * STEP, 1, PAST, OTHER)
    return line


@triton.jit
def store_line(
    ptr, stride, line, w, W, inside, COUNT: tl.constexpr, GRAIN: tl.constexpr,
    BEFORE: tl.constexpr, PAST: tl.constexpr,
):  # fmt: skip
    """Store COUNT tiles as the columns from w on, where they are in the image; COUNT is a multiple of GRAIN."""
    for col in tl.static_range(0, COUNT, GRAIN):
        there = within(w + col, W, inside, BEFORE, PAST)
        at = ptr + tl.cast(col, tl.int64) * stride
        if GRAIN > 1:
            piece = _together(line[col : col + GRAIN], GRAIN)
            tl.store(_piece(at, GRAIN), piece.to(ptr.dtype.element_ty), mask=there[:, :, None])
        else:
            tl.store(at, line[col].to(ptr.dtype.element_ty), mask=there)


def line_of(t: Tensor) -> tuple[int, ...]:
    """What the moves along lines of ``t`` (N, C, H, W) depend on: size of an element, its address, W, strides."""
    return (t.element_size(), t.data_ptr() % _BYTES, t.shape[3], *t.stride())


def grain(line: tuple[int, ...], span: int) -> int:
    """Elements that one access moves where each strip of ``span`` columns of a line does; a power of two."""
    itemsize, address, width, n, c, h, w = line
    if w != 1:
        return 1
    elements = math.gcd(_BYTES // itemsize, span, width, n, c, h)
    return math.gcd(elements * itemsize, address) // itemsize or 1


@functools.lru_cache(maxsize=4096)
def strip_width(cols: int, *lines: tuple[tuple[int, ...], int]) -> int:
    """The most columns side by side, of those that divide ``cols``, that move in whole pieces; 1 if none do.

    lines: what each array is and how many of its columns stand for one. Whole: 16 bytes, or a strip that is smaller.
    """
    wide = lambda line, span: grain(line, span) == min(_BYTES // line[0], span & -span)  # noqa: E731
    strip = math.gcd(_BYTES, cols)
    while strip > 1 and not all(wide(line, strip * columns) for line, columns in lines):
        strip //= 2
    return strip
