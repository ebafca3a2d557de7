"""Convolution: the gradient of the weights, a sum over all pixels; kernels/conv2d/ launches it."""

import torch
import triton.language as tl
from torch import Tensor

from ..device import cdiv, chip_of, dot_precision, on_device_of, passes
from ..launch.descriptor import strides_beside
from ..launch.entry import entry
from ..partials import partial_length, reduce_partials
from ..product import MatmulSettings, Product, product_choice
from ..tile import grouped_tile
from .geometry import (
    FEW,
    FILL,
    Geometry,
    Source,
    box_corner,
    box_of,
    box_pixels,
    box_tile,
    columns_of,
    flat_pixels,
    next_box,
    numbers_are_large,
    pixel_offset,
    rows_of,
)


@entry
def conv2d_weight_kernel(
    out_ptr, part_ptr,  # the weights' gradient
    dy_ptr, x,  # operands; x: pointer or descriptor
    strides_dy, strides_x,  # between images, channels, rows, columns, in elements
    strides_out,  # between output channels, input channels, tap rows, tap columns
    images, P, Q, H, W,  # rows and columns of dy, of x
    M, N, groups,  # output channels and input channels, of one group
    tiles_m, tiles_n, steps, total,  # steps: of the whole sum; total: row length of part
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    PRECISION: tl.constexpr, JOINT: tl.constexpr,
    SWAPPED: tl.constexpr,  # x's pixels are adjacent, not its channels: its tiles are loaded turned
    LARGE: tl.constexpr, LINES: tl.constexpr, DESCRIPTOR: tl.constexpr, BOXED: tl.constexpr,
    BOX_IMAGES: tl.constexpr, BOX_ROWS: tl.constexpr, BOX_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Program (t, s): share s of the sum over all pixels of tile t: one group, output channels, (tap, channels).

    JOINT: a tile's columns may hold several taps. LINES: as in ``gather``. BOXED: a step's pixels are a box, and
    boxes divide the images; x may move by a DESCRIPTOR then. dy is read by pointers: the tensor cores take such a tile
    from shared memory as it arrived, and would not take a box in the first place.
    """
    stride_yn, stride_yc, stride_yh, stride_yw = strides_dy
    stride_xn, stride_xc, stride_xh, stride_xw = strides_x
    stride_on, stride_oc, stride_or, stride_os = strides_out
    if LINES:
        N, stride_xw = N // 4 * 4, stride_xw // 4 * 4  # the compiler then knows that they are multiples of four
    tile = tl.program_id(0)
    group = tile // (tiles_m * tiles_n)
    tile_m, tile_n = grouped_tile(tile - group * (tiles_m * tiles_n), tiles_m, tiles_n, GROUP_M)
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    if JOINT:
        columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        tap = columns // N
        c = columns - tap * N
        if LINES:  # four columns stay together
            tap, c = tl.max_constancy(tap, 4), tl.max_contiguous(tl.multiple_of(c, 4), 4)
        there = columns < R * S * N
    else:
        blocks = tl.maximum(tl.cdiv(N, BLOCK_N), 1)
        tap = tile_n // blocks
        n = (tile_n - tap * blocks) * BLOCK_N
        c = n + tl.arange(0, BLOCK_N)
        there = c < N
    r = tap // S
    s = tap - r * S
    h_tap, w_tap = r * DILATION_H - PAD_H, s * DILATION_W - PAD_W  # in x, of output pixel 0
    c = c.to(tl.int64)
    x_columns = c * stride_xc + h_tap.to(tl.int64) * stride_xh + w_tap.to(tl.int64) * stride_xw
    dy_rows = offs_m.to(tl.int64) * stride_yc
    dy_ptr += group.to(tl.int64) * M * stride_yc
    if not DESCRIPTOR:
        x += group.to(tl.int64) * N * stride_xc

    share = tl.cdiv(steps, SPLITS)
    split = tl.program_id(1)
    begin = split * share
    # One step at least, which the launcher's shares all have: a way around the loop would define accumulators without
    # a product, for which ptxas makes every product wait for the one before it.
    end = tl.maximum(tl.minimum(begin + share, steps), begin + 1)
    tl.assume(begin < end)
    products = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if BOXED:
        image, row, column = box_corner(begin, P, Q, BOX_IMAGES, BOX_ROWS, BOX_COLUMNS)
        i, p, q, _ = box_pixels(0, 0, 0, images, P, Q, BOX_IMAGES, BOX_ROWS, BOX_COLUMNS)
        dy_box = dy_ptr + (dy_rows[:, None] + pixel_offset(i, p, q, stride_yn, stride_yh, stride_yw)[None, :])
        if not DESCRIPTOR:
            pixels = pixel_offset(i, p * STRIDE_H, q * STRIDE_W, stride_xn, stride_xh, stride_xw)
            x_box = x + (pixels[:, None] + x_columns[None, :])
        for _ in range(begin, end):
            if DESCRIPTOR:
                x_tile = box_tile(
                    x, image, row, column, h_tap, w_tap, n, N,
                    STRIDE_H, STRIDE_W, PAD_H + PAD_W + 1, BLOCK_K, BLOCK_N,
                )  # fmt: skip
            else:
                corner = pixel_offset(image, row * STRIDE_H, column * STRIDE_W, stride_xn, stride_xh, stride_xw)
                x_tile = tl.load(x_box + corner, mask=there[None, :], other=0.0)
            corner = pixel_offset(image, row, column, stride_yn, stride_yh, stride_yw)
            g_tile = tl.load(dy_box + corner, mask=offs_m[:, None] < M, other=0.0)
            products = tl.dot(g_tile, x_tile, products, input_precision=PRECISION)
            image, row, column = next_box(image, row, column, P, Q, BOX_IMAGES, BOX_ROWS, BOX_COLUMNS)
    else:
        for step in range(begin, end):
            image, row, column, inside = flat_pixels(step, images, P, Q, LARGE, BLOCK_K)
            h, w = row * STRIDE_H, column * STRIDE_W
            pixels = pixel_offset(image, h, w, stride_xn, stride_xh, stride_xw)
            mask = rows_of(inside, SWAPPED) & columns_of(there, SWAPPED)
            if not LINES:  # whose pixels lie all in the image
                if JOINT:
                    h = rows_of(h, SWAPPED) + columns_of(h_tap, SWAPPED)
                    w = rows_of(w, SWAPPED) + columns_of(w_tap, SWAPPED)
                else:
                    h, w = rows_of(h + h_tap, SWAPPED), rows_of(w + w_tap, SWAPPED)
                mask = mask & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            offsets = rows_of(pixels, SWAPPED) + columns_of(x_columns, SWAPPED)
            x_tile = tl.load(x + offsets, mask=mask, other=0.0)
            if SWAPPED:
                x_tile = x_tile.T
            pixels = pixel_offset(image, row, column, stride_yn, stride_yh, stride_yw)
            mask = (offs_m[:, None] < M) & inside[None, :]
            g_tile = tl.load(dy_ptr + (dy_rows[:, None] + pixels[None, :]), mask=mask, other=0.0)
            products = tl.dot(g_tile, x_tile, products, input_precision=PRECISION)

    first = group.to(tl.int64) * M
    offsets = ((first + offs_m) * stride_on)[:, None] + (
        c * stride_oc + r.to(tl.int64) * stride_or + s.to(tl.int64) * stride_os
    )[None, :]
    mask = (offs_m[:, None] < M) & there[None, :]
    if SPLITS > 1:
        tl.store(part_ptr + split.to(tl.int64) * total + offsets, products, mask=mask)
    else:
        tl.store(out_ptr + offsets, products.to(out_ptr.dtype.element_ty), mask=mask)


weight_choice = product_choice("conv2d_weight")


def conv2d_weight(
    dw: Tensor, dy: Tensor, x: Tensor, geometry: Geometry, precision: str, settings: MatmulSettings | None = None,
    lines: bool = False,
) -> None:  # fmt: skip
    """Write the gradient of the weights to dw (O, C / groups, R, S), dense memory.

    dy (images, O, P, Q): the gradient before the activation; x (images, C, H, W); any strides. lines: of x, see
    conv2d_gather.gather; the taps of a tile's columns then are several.
    """
    g, (O, N, R, S) = geometry, dw.shape
    images, _, P, Q = dy.shape
    M, itemsize = O // g.groups, dw.element_size()
    joint = lines or N < FEW
    columns, taps = (R * S * N, 1) if joint else (N, R * S)
    gpu = chip_of(dy)
    dot = dot_precision(gpu, precision)
    dy_, x_ = Source(dy), Source(x, g.stride)
    wide = x_.aligned and N % 16 == 0

    def chosen(descriptor):
        return weight_choice(gpu, Product(
            M, columns, images * P * Q, itemsize, passes=passes(dot, itemsize), descriptors=descriptor,
            vector=descriptor or (dy_.aligned and M % 16 == 0 and (lines or (wide and not joint))),
            count=taps * g.groups, fill=FILL, traffic=itemsize * sum(t.numel() for t in (dy, x, dw)),
        ))  # fmt: skip

    descriptor = gpu.has_descriptors and g.groups == 1 and not joint and dy_.aligned and x_.box
    given, box = settings, None
    settings = given or chosen(descriptor)
    if descriptor or lines:
        for block_k in (settings.BLOCK_K, settings.BLOCK_K // 2):
            exact = box_of(images, P, Q, block_k)
            # A pixel outside the output would meet a real one of x, and zero times infinity is not zero
            if box is None and images % exact[0] == P % exact[1] == Q % exact[2] == 0:
                box, settings = exact, settings._replace(BLOCK_K=block_k)
    if descriptor and box is None:
        descriptor, settings = False, given or chosen(False)
    steps = cdiv(images * P * Q, settings.BLOCK_K)
    splits = max(cdiv(steps, max(cdiv(steps, settings.SPLITS), 1)), 1)  # all of them have work
    tiles_m, tiles_n = cdiv(M, settings.BLOCK_M), max(taps * cdiv(columns, settings.BLOCK_N), 1)
    part, total = None, partial_length(dw.numel(), 0)
    if splits > 1:
        part = torch.empty(splits, total, dtype=torch.float32, device=dw.device)

    with on_device_of(dy):
        conv2d_weight_kernel[(g.groups * tiles_m * tiles_n, splits)](
            dw, part, dy, x_.descriptor(box, settings.BLOCK_N) if descriptor else x,
            dy.stride(), *strides_beside(descriptor, 4, x), dw.stride(),
            images, P, Q, *x.shape[2:], M, N, g.groups, tiles_m, tiles_n, steps, total,
            R, S, *g.stride, *g.padding, *g.dilation, dot, joint, x_.swapped, numbers_are_large(images * P * Q), lines,
            descriptor, box is not None, *(box or (1, 1, 1)),
            settings.BLOCK_M, settings.BLOCK_N, settings.BLOCK_K, splits, settings.GROUP_M,
            num_warps=settings.num_warps, num_stages=settings.num_stages,
        )  # fmt: skip
        if splits > 1:
            reduce_partials(dw, None, None, part, None, None, True)
