"""Convolution: gradients of the weights and of the bias, sums over all pixels; kernels/conv2d.py launches it."""

import torch
import triton.language as tl

from .conv2d_geometry import FEW, FILL, Source, box_corner, box_of, box_tile, columns_of, flat_pixels, rows_of
from .entry import entry
from .launch import MatmulSettings, Product, cdiv, chip_of, dot_precision, on_device_of, product_choice
from .partials import partial_length, reduce_partials
from .tile import backpropagate, grouped_tile


@entry
def _weight_kernel(
    out_ptr, out_sums_ptr, part_ptr,  # results: the weights' gradient, that of the bias
    dy, saved, x,  # operands: pointers or descriptors
    stride_yn, stride_yc, stride_yh, stride_yw, stride_sn, stride_sc, stride_sh, stride_sw,  # in elements
    stride_xn, stride_xc, stride_xh, stride_xw, stride_on, stride_oc, stride_or, stride_os,
    images, P, Q, H, W,  # rows and columns of dy, of x
    M, N, groups,  # output channels and input channels, of one group; N = 0: sums alone
    tiles_m, tiles_n, numel, total,  # numel: elements of out; total: row length of part
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    GRADIENT_OF: tl.constexpr, PRECISION: tl.constexpr, SUM_PRECISION: tl.constexpr, JOINT: tl.constexpr,
    SWAPPED: tl.constexpr,  # x's pixels are adjacent, not its channels: its tiles are loaded turned
    DESCRIPTORS: tl.constexpr, BOX_IMAGES: tl.constexpr, BOX_ROWS: tl.constexpr, BOX_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Program (t, s): share s of the sum over all pixels of tile t: one group, output channels, (tap, channels).

    JOINT: a tile's columns may hold several taps.
    """
    tile = tl.program_id(0)
    group = tile // (tiles_m * tiles_n)
    tile_m, tile_n = grouped_tile(tile - group * (tiles_m * tiles_n), tiles_m, tiles_n, GROUP_M)
    m = tile_m * BLOCK_M
    offs_m = m + tl.arange(0, BLOCK_M)
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
    dy_rows, saved_rows = offs_m.to(tl.int64) * stride_yc, offs_m.to(tl.int64) * stride_sc
    if not DESCRIPTORS:
        dy += group.to(tl.int64) * M * stride_yc
        x += group.to(tl.int64) * N * stride_xc
        if saved is not None:
            saved += group.to(tl.int64) * M * stride_sc

    if DESCRIPTORS:
        steps = tl.cdiv(images, BOX_IMAGES) * tl.cdiv(P, BOX_ROWS) * tl.cdiv(Q, BOX_COLUMNS)
    else:
        steps = tl.cdiv(images * P * Q, BLOCK_K)
    share = tl.cdiv(steps, SPLITS)
    split = tl.program_id(1)
    products = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    sums = tl.zeros((BLOCK_M, 16), dtype=tl.float32)  # every column holds the same sums
    for step in range(split * share, tl.minimum((split + 1) * share, steps)):
        if DESCRIPTORS:
            image, row, column = box_corner(step, P, Q, BOX_IMAGES, BOX_ROWS, BOX_COLUMNS)
            g_tile = dy.load([image, row, 0, column, m]).reshape(BLOCK_K, BLOCK_M).T
            if GRADIENT_OF is not None:
                saved_tile = saved.load([image, row, 0, column, m]).reshape(BLOCK_K, BLOCK_M).T
            x_tile = box_tile(
                x, image, row, column, h_tap, w_tap, n, N,
                STRIDE_H, STRIDE_W, PAD_H + PAD_W + 1, BLOCK_K, BLOCK_N,
            )  # fmt: skip
        else:
            image, row, column, inside = flat_pixels(step * BLOCK_K, images, P, Q, BLOCK_K)
            h, w = row * STRIDE_H, column * STRIDE_W
            image, row, column = image.to(tl.int64), row.to(tl.int64), column.to(tl.int64)
            pixels = image * stride_yn + row * stride_yh + column * stride_yw
            mask = (offs_m[:, None] < M) & inside[None, :]
            g_tile = tl.load(dy + (dy_rows[:, None] + pixels[None, :]), mask=mask, other=0.0)
            if GRADIENT_OF is not None:
                pixels = image * stride_sn + row * stride_sh + column * stride_sw
                saved_tile = tl.load(saved + (saved_rows[:, None] + pixels[None, :]), mask=mask, other=0.0)
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
        if GRADIENT_OF is not None:
            g_tile = backpropagate(g_tile.to(tl.float32), saved_tile.to(tl.float32), GRADIENT_OF).to(g_tile.dtype)
        if out_sums_ptr is not None:
            if tile_n == 0:
                ones = tl.full((BLOCK_K, 16), 1.0, dtype=g_tile.dtype)
                sums = tl.dot(g_tile, ones, sums, input_precision=SUM_PRECISION)
        products = tl.dot(g_tile, x_tile, products, input_precision=PRECISION)

    row_sums = tl.sum(sums, axis=1) * 0.0625
    first = group.to(tl.int64) * M
    offsets = ((first + offs_m) * stride_on)[:, None] + (
        c * stride_oc + r.to(tl.int64) * stride_or + s.to(tl.int64) * stride_os
    )[None, :]
    mask = (offs_m[:, None] < M) & there[None, :]
    sums_mask = (offs_m < M) & (tile_n == 0)
    if SPLITS > 1:
        part_ptr += split.to(tl.int64) * total
        tl.store(part_ptr + offsets, products, mask=mask)
        if out_sums_ptr is not None:
            tl.store(part_ptr + numel + first + offs_m, row_sums, mask=sums_mask)
    else:
        tl.store(out_ptr + offsets, products.to(out_ptr.dtype.element_ty), mask=mask)
        if out_sums_ptr is not None:
            tl.store(out_sums_ptr + first + offs_m, row_sums.to(out_sums_ptr.dtype.element_ty), mask=sums_mask)


weight_settings = product_choice("conv2d_weight")


def weight(dw, db, dy, saved, x, geometry, activation, need_w, precision, settings: MatmulSettings | None = None):
    """Write the gradients of the weights to dw and of the bias to db, which may be None; need_w False: to db alone.

    dy, saved (images, O, P, Q), x (images, C, H, W), any strides; dw (O, C / groups, R, S), dense memory.
    """
    g, (O, _, R, S) = geometry, dw.shape
    images, _, P, Q = dy.shape
    M, N, itemsize = O // g.groups, dw.shape[1] if need_w else 0, dw.element_size()
    joint = 0 < N < FEW
    columns, taps = (R * S * N, 1) if joint else (N, R * S if need_w else 1)
    gpu = chip_of(dy)
    dot, exact = dot_precision(gpu, precision), dot_precision(gpu, "highest")
    dy_, saved_, x_ = Source(dy), None if saved is None else Source(saved), Source(x, g.stride)
    descriptors = (
        gpu.has_descriptors and g.groups == 1 and not joint and need_w
        and dy_.box and x_.box and (saved_ is None or saved_.box)
    )  # fmt: skip
    adjacent = dy_.aligned and x_.aligned and (saved_ is None or saved_.aligned)

    def choose(descriptors):
        return settings or weight_settings(gpu, Product(
            M, columns, images * P * Q, itemsize,
            passes=3 if dot == "tf32x3" and dw.dtype == torch.float32 else 1, descriptors=descriptors,
            vector=descriptors or (adjacent and not joint and M % 16 == 0 and N % 16 == 0),
            wide_result=True, fused=saved is not None, count=taps * g.groups, fill=FILL,
            traffic=itemsize * sum(t.numel() for t in (dy, saved, x, dw) if t is not None),
        ))  # fmt: skip

    s, box = choose(descriptors), (1, 1, 1)
    if descriptors:
        box = box_of(images, P, Q, s.BLOCK_K)
        if images % box[0] or P % box[1] or Q % box[2]:  # a pixel outside the output would meet a real one of x
            descriptors, box, s = False, (1, 1, 1), choose(False)
    tiles_m, tiles_n = cdiv(M, s.BLOCK_M), max(taps * cdiv(columns, s.BLOCK_N), 1)
    part, total = None, partial_length(dw.numel(), O)
    if s.SPLITS > 1:
        part = torch.empty(s.SPLITS, total, dtype=torch.float32, device=dw.device)

    def source(o, channels):
        return o if o is None else o.descriptor(box, channels) if descriptors else o.t

    with on_device_of(dy):
        _weight_kernel[(g.groups * tiles_m * tiles_n, s.SPLITS)](
            dw, db, part, source(dy_, s.BLOCK_M), source(saved_, s.BLOCK_M), source(x_, s.BLOCK_N),
            *dy.stride(), *(saved.stride() if saved_ else (0, 0, 0, 0)), *x.stride(), *dw.stride(),
            images, P, Q, *x.shape[2:], M, N, g.groups, tiles_m, tiles_n, dw.numel(), total,
            R, S, *g.stride, *g.padding, *g.dilation, activation, dot, exact, joint, x_.swapped, descriptors, *box,
            s.BLOCK_M, s.BLOCK_N, s.BLOCK_K, s.SPLITS, s.GROUP_M,
            num_warps=s.num_warps, num_stages=s.num_stages,
        )  # fmt: skip
        if s.SPLITS > 1:
            reduce_partials(dw, None, db, part, None, None, True)
