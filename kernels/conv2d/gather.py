"""Convolution as a matrix product whose rows are gathered from the source: y, and dx; kernels/conv2d/ launches it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activation import INSTRUCTIONS, activate, keeps_derivative
from ..device import cdiv, chip_of, dot_precision, on_device_of, passes
from ..launch.entry import entry
from ..partials import partial_length, reduce_partials
from ..product import MatmulSettings, Product, product_choice
from ..tile import grouped_tile
from .geometry import (
    FEW,
    FEW_PIXELS,
    Geometry,
    Source,
    columns_of,
    fit_step,
    flat_pixels,
    inverses,
    most_of_a_class,
    next_channels,
    numbers_are_large,
    pixel_offset,
    rows_of,
    walk,
)


@triton.jit
def _finish(
    products, out_ptr, saved_ptr, bias_ptr, rows, inside, n, N, stride_oc,
    ACTIVATION: tl.constexpr, PRECISE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SUBTILES: tl.constexpr,
):  # fmt: skip
    """Bias, activation and store of one tile, in SUBTILES column parts so that fewer values live at once."""
    if SUBTILES > 1:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = products.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
        _finish(
            left, out_ptr, saved_ptr, bias_ptr, rows, inside, n, N, stride_oc,
            ACTIVATION, PRECISE, BLOCK_M, HALF, SUBTILES // 2,
        )  # fmt: skip
        _finish(
            right, out_ptr, saved_ptr, bias_ptr, rows, inside, n + HALF, N, stride_oc,
            ACTIVATION, PRECISE, BLOCK_M, HALF, SUBTILES // 2,
        )  # fmt: skip
    else:
        offs_n = n + tl.arange(0, BLOCK_N)
        if bias_ptr is not None:
            products += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
        y, kept = activate(products, ACTIVATION, PRECISE)
        mask = inside[:, None] & (offs_n[None, :] < N)
        offsets = rows[:, None] + (offs_n.to(tl.int64) * stride_oc)[None, :]
        tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=mask)
        if saved_ptr is not None:
            tl.store(saved_ptr + offsets, kept.to(saved_ptr.dtype.element_ty), mask=mask)


@entry
def conv2d_gather_kernel(
    out_ptr, out_saved_ptr, part_ptr,  # results
    a_ptr, b_ptr, bias_ptr,
    strides_a,  # between images, channels, rows, columns, in elements
    strides_b,  # between result channels, summed channels, tap rows, tap columns, groups
    strides_out,  # as of a
    images, P, Q, H, W,  # rows and columns of the result, of the source
    N, K, groups,  # result channels and summed channels, of one group
    tiles_m, tiles_n, total,  # total: row length of part
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    PERIOD_H: tl.constexpr, PERIOD_W: tl.constexpr, INVERSE_H: tl.constexpr, INVERSE_W: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # the source is the gradient at the output, the result that at the input
    ACTIVATION: tl.constexpr, PRECISE: tl.constexpr, PRECISION: tl.constexpr, EVEN_K: tl.constexpr, JOINT: tl.constexpr,
    SWAPPED: tl.constexpr,  # the source's pixels are adjacent, not its channels: tiles are loaded turned
    LARGE: tl.constexpr, LINES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr, GROUP_M: tl.constexpr, SUBTILES: tl.constexpr,
):  # fmt: skip
    """Program (t, s): share s of the sum over (tap row, tap column, channel) of tile t: one class, group, m, n.

    Where the source is the gradient, a class is the result's pixels of one remainder modulo the stride: the same taps
    reach all of them, and among them the step is 1. JOINT: a reduction step may hold several taps.
    LINES: see ``gather``.
    """
    stride_an, stride_ac, stride_ah, stride_aw = strides_a
    stride_bn, stride_bk, stride_br, stride_bs, stride_bg = strides_b
    stride_on, stride_oc, stride_oh, stride_ow = strides_out
    if LINES:
        K, stride_aw = K // 4 * 4, stride_aw // 4 * 4  # the compiler then knows that they are multiples of four
    tile = tl.program_id(0)
    batch = tile // (tiles_m * tiles_n)
    group = batch % groups
    tile_m, tile_n = grouped_tile(tile - batch * (tiles_m * tiles_n), tiles_m, tiles_n, GROUP_M)
    n = tile_n * BLOCK_N
    remainder = batch // groups
    first_h, tap_h, taps_h, origin_h, P = walk(
        remainder // STRIDE_W, P, PAD_H, STRIDE_H, DILATION_H, R, PERIOD_H, INVERSE_H, TRANSPOSED
    )
    first_w, tap_w, taps_w, origin_w, Q = walk(
        remainder % STRIDE_W, Q, PAD_W, STRIDE_W, DILATION_W, S, PERIOD_W, INVERSE_W, TRANSPOSED
    )
    STEP_H: tl.constexpr = 1 if TRANSPOSED else STRIDE_H  # of the source from a row of the result to the next
    STEP_W: tl.constexpr = 1 if TRANSPOSED else STRIDE_W
    NEXT_H: tl.constexpr = -(DILATION_H * PERIOD_H // STRIDE_H) if TRANSPOSED else DILATION_H  # from a tap to the next
    NEXT_W: tl.constexpr = -(DILATION_W * PERIOD_W // STRIDE_W) if TRANSPOSED else DILATION_W
    SPREAD_H: tl.constexpr = STRIDE_H if TRANSPOSED else 1  # of the result
    SPREAD_W: tl.constexpr = STRIDE_W if TRANSPOSED else 1

    image, row, column, inside = flat_pixels(tile_m, images, P, Q, LARGE, BLOCK_M)
    a_ptr += group.to(tl.int64) * K * stride_ac
    b_ptr += group.to(tl.int64) * stride_bg
    h, w = row * STEP_H + origin_h, column * STEP_W + origin_w
    a_rows = pixel_offset(image, h, w, stride_an, stride_ah, stride_aw)  # by tap 0
    offs_n, offs_k = n + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)

    blocks = tl.maximum(tl.cdiv(K, BLOCK_K), 1)
    steps = tl.cdiv(taps_h * taps_w * K, BLOCK_K) if JOINT else taps_h * taps_w * blocks
    share = tl.cdiv(steps, SPLITS)
    split = tl.program_id(1)
    begin = split * share
    full = tl.minimum(begin + share, steps)
    # A class without taps, or with fewer steps than shares, takes one step of zeros: a way around the loop would define
    # accumulators without a product, for which ptxas makes every product wait.
    end = tl.maximum(full, begin + 1)
    tl.assume(begin < end)
    if not JOINT:
        tap = begin // blocks
        start, t = (begin - tap * blocks) * BLOCK_K, tap // tl.maximum(taps_w, 1)
        u = tap - t * taps_w
    products = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(begin, end):
        if JOINT:
            k = step * BLOCK_K + offs_k
            tap = k // K
            c = k - tap * K
            t = tap // tl.maximum(taps_w, 1)
            u = tap - t * taps_w
        else:
            c = start + offs_k
        r, s = tap_h + t * PERIOD_H, tap_w + u * PERIOD_W  # of the kernel
        mask = rows_of(inside & (step < full), SWAPPED)
        if not LINES:  # whose pixels lie all in the image
            if JOINT:
                source_h = rows_of(h, SWAPPED) + columns_of(t * NEXT_H, SWAPPED)
                source_w = rows_of(w, SWAPPED) + columns_of(u * NEXT_W, SWAPPED)
            else:
                source_h, source_w = rows_of(h + t * NEXT_H, SWAPPED), rows_of(w + u * NEXT_W, SWAPPED)
            mask = mask & (source_h >= 0) & (source_h < H) & (source_w >= 0) & (source_w < W)
        there = k < taps_h * taps_w * K if JOINT else c < K
        if JOINT or not EVEN_K:
            mask = mask & columns_of(there, SWAPPED)
        c = c.to(tl.int64)
        move_h, move_w = (t * NEXT_H).to(tl.int64), (u * NEXT_W).to(tl.int64)
        offsets = columns_of(c * stride_ac + move_h * stride_ah + move_w * stride_aw, SWAPPED)
        a_tile = tl.load(a_ptr + (rows_of(a_rows, SWAPPED) + offsets), mask=mask, other=0.0)
        if SWAPPED:
            a_tile = a_tile.T
        offsets = c * stride_bk + r.to(tl.int64) * stride_br + s.to(tl.int64) * stride_bs
        mask = (offs_n[None, :] < N) & (step < full)
        if JOINT or not EVEN_K:
            mask = mask & there[:, None]
        b_tile = tl.load(b_ptr + offsets[:, None] + (offs_n.to(tl.int64) * stride_bn)[None, :], mask=mask, other=0.0)
        products = tl.dot(a_tile, b_tile, products, input_precision=PRECISION)
        if not JOINT:
            start, u, t = next_channels(start, u, t, K, taps_w, BLOCK_K)

    rows = pixel_offset(
        image, first_h + row * SPREAD_H, first_w + column * SPREAD_W, stride_on, stride_oh, stride_ow
    ) + (group.to(tl.int64) * N * stride_oc)
    if SPLITS > 1:
        part_ptr += split.to(tl.int64) * total
        offsets = rows[:, None] + (offs_n.to(tl.int64) * stride_oc)[None, :]
        tl.store(part_ptr + offsets, products, mask=inside[:, None] & (offs_n[None, :] < N))
    else:
        if bias_ptr is not None:
            bias_ptr += group * N
        _finish(
            products, out_ptr, out_saved_ptr, bias_ptr, rows, inside, n, N, stride_oc,
            ACTIVATION, PRECISE, BLOCK_M, BLOCK_N, SUBTILES,
        )  # fmt: skip


gather_choice = product_choice("conv2d_gather")


def conv2d_gather(
    out: Tensor, out_saved: Tensor | None, a: Tensor, w: Tensor, geometry: Geometry, precision: str, *,
    transposed: bool, bias: Tensor | None = None, activation: str | None = None,
    settings: MatmulSettings | None = None, lines: bool = False,
) -> None:  # fmt: skip
    """Write the convolution of a with w, or that transposed, to out (and what to save to out_saved), laid out alike.

    a (images, channels, H, W), any strides: x, or transposed the gradient before the activation. out: dense memory.
    w (O, C / groups, R, S). lines: the channels of a and w are adjacent, as many as a multiple of four, and four of
    them are the smallest part of memory that is aligned.
    """
    g, (R, S), itemsize = geometry, w.shape[2:], a.element_size()
    images, channels, P, Q = out.shape
    N, K = channels // g.groups, a.shape[1] // g.groups
    classes, rows_p, rows_q = most_of_a_class(geometry, (P, Q), transposed)
    joint = K < FEW and not lines
    if not joint and w.stride(1) != 1 and images * P * Q >= FEW_PIXELS:
        w = w.contiguous(memory_format=torch.channels_last)
    gpu = chip_of(a)
    dot = dot_precision(gpu, precision)
    a_ = Source(a, (1, 1) if transposed else g.stride)
    adjacent = a_.aligned and w.stride(1) == 1 and w.data_ptr() % 16 == 0
    results = (out, out) if keeps_derivative(activation) else (out,)  # kept or not: two forwards are bitwise equal
    problem = Product(
        images * rows_p * rows_q, N, max(R * S // classes, 1) * K, itemsize, passes=passes(dot, itemsize),
        vector=lines or (adjacent and not joint and K % 16 == 0 and N % 16 == 0),
        wide_result=out.stride(1) == 1 and N * itemsize % 16 == 0, double=len(results) > 1,
        finish=INSTRUCTIONS[activation], count=classes * g.groups,
        traffic=itemsize * sum(t.numel() for t in (a, w, *results)),
    )  # fmt: skip
    settings = settings or fit_step(gather_choice(gpu, problem), K, itemsize)
    tiles_m, tiles_n = cdiv(images * rows_p * rows_q, settings.BLOCK_M), cdiv(N, settings.BLOCK_N)
    total = partial_length(out.numel(), 0)
    part = torch.empty(settings.SPLITS, total, dtype=torch.float32, device=a.device) if settings.SPLITS > 1 else None

    O = w.shape[0]
    of_o, of_c, of_r, of_s = w.stride()
    with on_device_of(a):
        conv2d_gather_kernel[(classes * g.groups * tiles_m * tiles_n, settings.SPLITS)](
            out, out_saved, part, a, w, bias, a.stride(),
            (*((of_c, of_o) if transposed else (of_o, of_c)), of_r, of_s, O // g.groups * of_o), out.stride(),
            images, P, Q, *a.shape[2:], N, K, g.groups, tiles_m, tiles_n, total,
            R, S, *g.stride, *g.padding, *g.dilation, *inverses(g, transposed), transposed,
            activation, a.dtype == torch.float32, dot, K % settings.BLOCK_K == 0, joint, a_.swapped,
            numbers_are_large(images * rows_p * rows_q), lines,
            settings.BLOCK_M, settings.BLOCK_N, settings.BLOCK_K, settings.SPLITS, settings.GROUP_M, settings.SUBTILES,
            num_warps=settings.num_warps, num_stages=settings.num_stages,
        )  # fmt: skip
        if settings.SPLITS > 1:
            inner = 1 if out.stride(1) == 1 else P * Q
            reduce_partials(out, out_saved, None, part, bias, activation, a.dtype == torch.float32, inner=inner)
