"""Convolution: the gradient of the weights, a sum over all pixels; kernels/conv2d.py launches it."""

import torch
import triton.language as tl

from .conv2d_geometry import (
    FEW,
    FILL,
    Source,
    box_corner,
    box_of,
    box_pixels,
    box_tile,
    columns_of,
    flat_pixels,
    numbers_are_large,
    rows_of,
)
from .entry import entry
from .launch import MatmulSettings, Product, cdiv, chip_of, dot_precision, on_device_of, passes, product_choice
from .partials import partial_length, reduce_partials
from .tile import grouped_tile


@entry
def _weight_kernel(
    out_ptr, part_ptr,  # the weights' gradient
    dy_ptr, x,  # operands; x: pointer or descriptor
    stride_yn, stride_yc, stride_yh, stride_yw, stride_xn, stride_xc, stride_xh, stride_xw,  # in elements
    stride_on, stride_oc, stride_or, stride_os,
    images, P, Q, H, W,  # rows and columns of dy, of x
    M, N, groups,  # output channels and input channels, of one group
    tiles_m, tiles_n, steps, total,  # steps: of the whole sum; total: row length of part
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    PRECISION: tl.constexpr, JOINT: tl.constexpr,
    SWAPPED: tl.constexpr,  # x's pixels are adjacent, not its channels: its tiles are loaded turned
    LARGE: tl.constexpr,
    DESCRIPTOR: tl.constexpr, BOX_IMAGES: tl.constexpr, BOX_ROWS: tl.constexpr, BOX_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Program (t, s): share s of the sum over all pixels of tile t: one group, output channels, (tap, channels).

    JOINT: a tile's columns may hold several taps. DESCRIPTOR: a step's pixels are a box, as x moves. dy is read by
    pointers, whose tiles the tensor cores take from shared memory as they arrive: those of boxes they would not.
    """
    tile = tl.program_id(0)
    group = tile // (tiles_m * tiles_n)
    tile_m, tile_n = grouped_tile(tile - group * (tiles_m * tiles_n), tiles_m, tiles_n, GROUP_M)
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    if JOINT:
        columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        tap = columns // N
        c = columns - tap * N
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
    if DESCRIPTOR:
        image, row, column = box_corner(begin, P, Q, BOX_IMAGES, BOX_ROWS, BOX_COLUMNS)
        i, p, q, _ = box_pixels(0, 0, 0, images, P, Q, BOX_IMAGES, BOX_ROWS, BOX_COLUMNS)
        pixels = i.to(tl.int64) * stride_yn + p.to(tl.int64) * stride_yh + q.to(tl.int64) * stride_yw
        of_box = dy_ptr + (dy_rows[:, None] + pixels[None, :])
        for _ in range(begin, end):
            x_tile = box_tile(
                x, image, row, column, h_tap, w_tap, n, N,
                STRIDE_H, STRIDE_W, PAD_H + PAD_W + 1, BLOCK_K, BLOCK_N,
            )  # fmt: skip
            corner = image.to(tl.int64) * stride_yn + row.to(tl.int64) * stride_yh + column.to(tl.int64) * stride_yw
            g_tile = tl.load(of_box + corner, mask=offs_m[:, None] < M, other=0.0)  # boxes divide the images
            products = tl.dot(g_tile, x_tile, products, input_precision=PRECISION)
            # The next box, counted: divisions would take longer than all else
            column += BOX_COLUMNS
            row = tl.where(column < Q, row, row + BOX_ROWS)
            column = tl.where(column < Q, column, 0)
            image = tl.where(row < P, image, image + BOX_IMAGES)
            row = tl.where(row < P, row, 0)
    else:
        for step in range(begin, end):
            image, row, column, inside = flat_pixels(step, images, P, Q, LARGE, BLOCK_K)
            h, w = row * STRIDE_H, column * STRIDE_W
            pixels = image * stride_xn + h.to(tl.int64) * stride_xh + w.to(tl.int64) * stride_xw
            if JOINT:
                h = rows_of(h, SWAPPED) + columns_of(h_tap, SWAPPED)
                w = rows_of(w, SWAPPED) + columns_of(w_tap, SWAPPED)
            else:
                h, w = rows_of(h + h_tap, SWAPPED), rows_of(w + w_tap, SWAPPED)
            mask = rows_of(inside, SWAPPED) & columns_of(there, SWAPPED)
            mask = mask & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            offsets = rows_of(pixels, SWAPPED) + columns_of(x_columns, SWAPPED)
            x_tile = tl.load(x + offsets, mask=mask, other=0.0)
            if SWAPPED:
                x_tile = x_tile.T
            pixels = image * stride_yn + row.to(tl.int64) * stride_yh + column.to(tl.int64) * stride_yw
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


weight_settings = product_choice("conv2d_weight")


def weight(dw, dy, x, geometry, precision, settings: MatmulSettings | None = None):
    """Write the gradient of the weights to dw (O, C / groups, R, S), dense memory.

    dy (images, O, P, Q): the gradient before the activation; x (images, C, H, W); any strides.
    """
    g, (O, N, R, S) = geometry, dw.shape
    images, _, P, Q = dy.shape
    M, itemsize = O // g.groups, dw.element_size()
    joint = N < FEW
    columns, taps = (R * S * N, 1) if joint else (N, R * S)
    gpu = chip_of(dy)
    dot = dot_precision(gpu, precision)
    dy_, x_ = Source(dy), Source(x, g.stride)

    def choose(descriptor):
        return settings or weight_settings(gpu, Product(
            M, columns, images * P * Q, itemsize, passes=passes(dot, itemsize), descriptors=descriptor,
            vector=descriptor or (dy_.aligned and x_.aligned and not joint and M % 16 == 0 and N % 16 == 0),
            count=taps * g.groups, fill=FILL, traffic=itemsize * sum(t.numel() for t in (dy, x, dw)),
        ))  # fmt: skip

    descriptor, s, box = False, choose(False), (1, 1, 1)
    if gpu.has_descriptors and g.groups == 1 and not joint and dy_.aligned and x_.box:
        wide = choose(True)
        for block_k in (wide.BLOCK_K, wide.BLOCK_K // 2):
            exact = box_of(images, P, Q, block_k)
            # A pixel outside the output would meet a real one of x, and zero times infinity is not zero
            if not descriptor and images % exact[0] == P % exact[1] == Q % exact[2] == 0:
                descriptor, s, box = True, wide._replace(BLOCK_K=block_k), exact
    steps = cdiv(images * P * Q, s.BLOCK_K)
    splits = max(cdiv(steps, max(cdiv(steps, s.SPLITS), 1)), 1)  # all of them have work
    tiles_m, tiles_n = cdiv(M, s.BLOCK_M), max(taps * cdiv(columns, s.BLOCK_N), 1)
    part, total = None, partial_length(dw.numel(), 0)
    if splits > 1:
        part = torch.empty(splits, total, dtype=torch.float32, device=dw.device)

    with on_device_of(dy):
        _weight_kernel[(g.groups * tiles_m * tiles_n, splits)](
            dw, part, dy, x_.descriptor(box, s.BLOCK_N) if descriptor else x,
            *dy.stride(), *x.stride(), *dw.stride(),
            images, P, Q, *x.shape[2:], M, N, g.groups, tiles_m, tiles_n, steps, total,
            R, S, *g.stride, *g.padding, *g.dilation, dot, joint, x_.swapped, numbers_are_large(images * P * Q),
            descriptor, *box, s.BLOCK_M, s.BLOCK_N, s.BLOCK_K, splits, s.GROUP_M,
            num_warps=s.num_warps, num_stages=s.num_stages,
        )  # fmt: skip
        if splits > 1:
            reduce_partials(dw, None, None, part, None, None, True)
