"""What the convolution's kernels share: its geometry, the pixels of a tile, and where they look in the source.

A tile's pixels are numbered one after another, or a box of images x rows x columns that a descriptor moves.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..device import cdiv
from ..launch.descriptor import tensor_descriptor

FILL = 1.3  # dw sums over very many pixels, and few tiles do it: see Product.fill
FEW = 32  # channels below which a reduction step holds several taps
FEW_PIXELS = 1024  # fewer are not worth a copy of weights whose channels are not adjacent


class Geometry(NamedTuple):
    """Sizes of one convolution; pairs are (rows, columns)."""

    stride: tuple[int, int]
    padding: tuple[int, int]  # before the first row and column; what is after the last follows from size
    dilation: tuple[int, int]
    groups: int
    size: tuple[int, int]  # of the output


def inverses(geometry, transposed):
    """PERIOD and INVERSE of both axes, as ``walk`` takes them."""
    if not transposed:
        return 1, 1, 1, 1
    periods, inverses = [], []
    for stride, dilation in zip(geometry.stride, geometry.dilation, strict=True):
        common = math.gcd(stride, dilation)
        periods.append(stride // common)
        inverses.append(pow(dilation // common, -1, stride // common))
    return *periods, *inverses


def most_of_a_class(geometry, size, transposed):
    """How many classes of pixels a result of that size has, and the most rows and columns of one; see ``walk``."""
    if not transposed:
        return 1, *size
    return math.prod(geometry.stride), *(cdiv(n, stride) for n, stride in zip(size, geometry.stride, strict=True))


def dense_channels_last(t):
    return t.is_contiguous(memory_format=torch.channels_last) and t.stride(1) == 1


class Source:
    """A tensor (images, channels, rows, columns) from which tiles take pixels that are ``stride`` apart."""

    def __init__(self, t, stride=(1, 1)):
        self.t, self.stride = t, stride
        images, channels, rows, columns = t.stride()
        step = 16 // t.element_size()
        self.aligned = channels == 1 and t.data_ptr() % 16 == 0 and images % step == rows % step == columns % step == 0
        self.swapped = channels != 1 and (columns == 1 or rows == 1)
        self.box = (  # can be moved by descriptors
            self.aligned and min(images, rows, columns) > 0
            and t.shape[2] % stride[0] == t.shape[3] % stride[1] == 0
            and (stride == (1, 1) or (columns == t.shape[1] and t.shape[1] % (128 // t.element_size()) == 0))
        )  # fmt: skip

    def descriptor(self, box, channels):
        (N, C, H, W), (n, _, h, w), (u, v) = self.t.shape, self.t.stride(), self.stride
        return tensor_descriptor(
            self.t, [N, H // u, u, W // v, v * C], [n, u * h, h, v * w, 1], [box[0], box[1], 1, box[2], channels]
        )


@functools.lru_cache(maxsize=4096)
def box_of(images, rows, columns, pixels):
    """Images, rows and columns of the box of ``pixels``, a power of two, that overhangs the images least."""
    powers = [2**i for i in range(pixels.bit_length())]
    shapes = [(pixels // (h * w), h, w) for w in powers for h in powers if h * w <= pixels]
    covered = lambda b: math.prod(cdiv(n, k) * k for n, k in zip((images, rows, columns), b, strict=True))  # noqa: E731
    return min(shapes, key=lambda b: (covered(b), -b[2], -b[1]))


def fit_step(s, channels, itemsize):
    """Shorten the reduction step while that leaves fewer of its channels empty, down to 64 bytes."""
    while (
        s.BLOCK_K * itemsize > 64
        and cdiv(channels, s.BLOCK_K // 2) * (s.BLOCK_K // 2) < cdiv(channels, s.BLOCK_K) * s.BLOCK_K
    ):
        s = s._replace(BLOCK_K=s.BLOCK_K // 2)
    return s


def numbers_are_large(pixels):
    """Whether counting pixels, up to the end of the last tile, needs 64 bits."""
    return pixels >= 2**31 - 2**16


@triton.jit
def flat_pixels(tile, images, P, Q, LARGE: tl.constexpr, BLOCK: tl.constexpr):
    """The pixels of tile number ``tile`` -> image (int64), row, column, whether there is such a pixel."""
    INDEX: tl.constexpr = tl.int64 if LARGE else tl.int32
    i = tl.cast(tile, INDEX) * BLOCK + tl.arange(0, BLOCK)
    size = tl.maximum(tl.cast(P, INDEX) * Q, 1)
    image = i // size
    row = (i - image * size) // tl.maximum(Q, 1)
    column = i - image * size - row * Q
    return image.to(tl.int64), row.to(tl.int32), column.to(tl.int32), image < images


@triton.jit
def next_channels(c, u, t, K, taps_w, BLOCK_K: tl.constexpr):
    """The first channel of a step and its tap's column and row -> those of the next step.

    They are counted on, as divisions would take longer than all else that a step computes.
    """
    c += BLOCK_K
    u = tl.where(c < K, u, u + 1)
    c = tl.where(c < K, c, 0)
    t = tl.where(u < taps_w, t, t + 1)
    return c, tl.where(u < taps_w, u, 0), t


@triton.jit
def next_box(image, row, column, P, Q, BOX_IMAGES: tl.constexpr, BOX_ROWS: tl.constexpr, BOX_COLUMNS: tl.constexpr):
    """The corner of a box -> that of the next, counted on as in ``next_channels``."""
    column += BOX_COLUMNS
    row = tl.where(column < Q, row, row + BOX_ROWS)
    column = tl.where(column < Q, column, 0)
    image = tl.where(row < P, image, image + BOX_IMAGES)
    return image, tl.where(row < P, row, 0), column


@triton.jit
def box_corner(box, P, Q, BOX_IMAGES: tl.constexpr, BOX_ROWS: tl.constexpr, BOX_COLUMNS: tl.constexpr):
    """Number of a box -> its first image, row, column."""
    across, down = tl.maximum(tl.cdiv(Q, BOX_COLUMNS), 1), tl.maximum(tl.cdiv(P, BOX_ROWS), 1)
    line = box // across
    return line // down * BOX_IMAGES, line % down * BOX_ROWS, (box - line * across) * BOX_COLUMNS


@triton.jit
def box_pixels(
    image, row, column, images, P, Q, BOX_IMAGES: tl.constexpr, BOX_ROWS: tl.constexpr, BOX_COLUMNS: tl.constexpr
):
    """The pixels of the box with that corner, in the form of ``flat_pixels``."""
    i = tl.arange(0, BOX_IMAGES * BOX_ROWS * BOX_COLUMNS)
    image = image + i // (BOX_ROWS * BOX_COLUMNS)
    row = row + i // BOX_COLUMNS % BOX_ROWS
    column = column + i % BOX_COLUMNS
    return image, row, column, (image < images) & (row < P) & (column < Q)


@triton.jit
def box_tile(
    source, image, row, column, h, w, c, channels,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, LIFT: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """(BLOCK, CHANNELS): channels from c on at the pixels (row * STRIDE_H + h, column * STRIDE_W + w) of a box.

    The descriptor's axes are image, row // stride, row % stride, column // stride, (column % stride, channel): in
    these the pixels are adjacent whatever the stride. LIFT * stride keeps the dividends positive.
    """
    h += LIFT * STRIDE_H
    w += LIFT * STRIDE_W
    tile = source.load([
        image, row + h // STRIDE_H - LIFT, h % STRIDE_H, column + w // STRIDE_W - LIFT, w % STRIDE_W * channels + c,
    ])  # fmt: skip
    return tile.reshape(BLOCK, CHANNELS)


@triton.jit
def pixel_offset(image, row, column, stride_image, stride_row, stride_column):
    """Where a pixel lies, in elements, int64; numbers or vectors of them."""
    return (
        tl.cast(image, tl.int64) * stride_image + tl.cast(row, tl.int64) * stride_row
        + tl.cast(column, tl.int64) * stride_column
    )  # fmt: skip


@triton.jit
def walk(
    remainder, size, PAD: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, TAPS: tl.constexpr,
    PERIOD: tl.constexpr, INVERSE: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Which pixels of the result one class has along an axis of ``size`` pixels, and which taps they take.

    Returns (first_pixel, first_tap, taps, source_of_first, pixels): the class has ``pixels`` pixels from first_pixel
    on; each takes ``taps`` taps from first_tap on, PERIOD apart. With its first tap the first pixel reads the source
    at source_of_first.

    TRANSPOSED: the result is the gradient at the input. Its pixels i with (i + PAD) % STRIDE == remainder are reached
    by the same taps, PERIOD = STRIDE / gcd(STRIDE, DILATION) apart; INVERSE is that of DILATION / gcd modulo PERIOD.
    """
    if TRANSPOSED:
        COMMON: tl.constexpr = STRIDE // PERIOD
        first = ((remainder - PAD) % STRIDE + STRIDE) % STRIDE
        tap = remainder // COMMON * INVERSE % PERIOD
        taps = tl.where(remainder % COMMON == 0, tl.maximum(TAPS - tap + PERIOD - 1, 0) // PERIOD, 0)
        origin = (first + PAD - tap * DILATION) // STRIDE
        pixels = tl.maximum(size - first + STRIDE - 1, 0) // STRIDE
    else:
        first, tap, taps, origin, pixels = 0, 0, TAPS, -PAD, size
    return first, tap, taps, origin, pixels


@triton.jit
def rows_of(v, SWAPPED: tl.constexpr):
    """A vector along a tile's rows, whose axes may be swapped."""
    return v[None, :] if SWAPPED else v[:, None]


@triton.jit
def columns_of(v, SWAPPED: tl.constexpr):
    """A vector along a tile's columns, whose axes may be swapped."""
    return v[:, None] if SWAPPED else v[None, :]
