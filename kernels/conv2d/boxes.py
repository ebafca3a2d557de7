"""Convolution as a matrix product whose pixels move in boxes, by descriptors: y, and dx; kernels/conv2d/ launches it.

Hopper's tensor cores multiply without waits where both operands come from shared memory as they arrived there. A box of
pixels is such an operand in second place alone: so the result's tile is computed as channels x pixels, and the weights
are the first operand, rows of a matrix.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activation import INSTRUCTIONS, activate, keeps_derivative
from ..device import cdiv, chip_of, dot_precision, on_device_of, passes
from ..launch.descriptor import strides_beside, tensor_descriptor
from ..launch.entry import entry
from ..partials import partial_length, reduce_partials
from ..product import MatmulSettings, Product
from ..tile import grouped_tile
from .gather import gather_choice
from .geometry import (
    FEW,
    FEW_PIXELS,
    Geometry,
    Source,
    box_corner,
    box_of,
    box_pixels,
    box_tile,
    fit_step,
    inverses,
    most_of_a_class,
    next_channels,
    pixel_offset,
    walk,
)


@triton.jit
def _finish(
    products, out, saved, bias, offsets, inside,
    ACTIVATION: tl.constexpr, PRECISE: tl.constexpr, DESCRIPTORS: tl.constexpr,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr, SUBTILES: tl.constexpr,
):  # fmt: skip
    """Bias and activation of a tile (CHANNELS, PIXELS) -> result and what to save, in the dtype of both.

    In SUBTILES parts of the pixels, so that fewer float32 values live at once. Each part takes the whole ``bias``.
    """
    if SUBTILES > 1:
        HALF: tl.constexpr = PIXELS // 2
        left, right = products.reshape(CHANNELS, 2, HALF).permute(0, 2, 1).split()
        left_y, left_kept = _finish(
            left, out, saved, bias, offsets, inside, ACTIVATION, PRECISE, DESCRIPTORS, CHANNELS, HALF, SUBTILES // 2
        )
        right_y, right_kept = _finish(
            right, out, saved, bias, offsets, inside, ACTIVATION, PRECISE, DESCRIPTORS, CHANNELS, HALF, SUBTILES // 2
        )
        y = tl.join(left_y, right_y).permute(0, 2, 1).reshape(CHANNELS, PIXELS)
        kept = tl.join(left_kept, right_kept).permute(0, 2, 1).reshape(CHANNELS, PIXELS)
    else:
        if bias is not None:
            products += bias[:, None]
        y, kept = activate(products, ACTIVATION, PRECISE)
        dtype: tl.constexpr = out.dtype if DESCRIPTORS else out.dtype.element_ty
        y, kept = y.to(dtype), kept.to(dtype)
    return y, kept


@entry
def conv2d_boxes_kernel(
    out, out_saved, part_ptr,  # results: pointers or descriptors
    a, w, bias_ptr,  # descriptors of the source and of the weights, a matrix (output channels, taps * input channels)
    strides_out,  # between images, channels, rows, columns, in elements
    images, P, Q,  # rows and columns of the result
    M, K, channels,  # of the result, of the source, of a tap in the weights
    tiles_m, tiles_n, total,  # total: row length of part
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    PERIOD_H: tl.constexpr, PERIOD_W: tl.constexpr, INVERSE_H: tl.constexpr, INVERSE_W: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # the source is the gradient at the output, the result that at the input
    ACTIVATION: tl.constexpr, PRECISE: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS_OUT: tl.constexpr,
    BOX_IMAGES: tl.constexpr, BOX_ROWS: tl.constexpr, BOX_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,  # channels, pixels, summed channels
    SPLITS: tl.constexpr, GROUP_M: tl.constexpr, SUBTILES: tl.constexpr,
):  # fmt: skip
    """Program (t, s): share s of the sum over (tap row, tap column, channel) of tile t: one class, pixels, channels.

    Classes as in gather.py.
    """
    stride_on, stride_oc, stride_oh, stride_ow = strides_out
    tile = tl.program_id(0)
    remainder = tile // (tiles_m * tiles_n)
    tile_n, tile_m = grouped_tile(tile - remainder * (tiles_m * tiles_n), tiles_n, tiles_m, GROUP_M)
    m = tile_m * BLOCK_M
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
    LIFT: tl.constexpr = PAD_H + PAD_W + 1

    corner_image, corner_row, corner_column = box_corner(tile_n, P, Q, BOX_IMAGES, BOX_ROWS, BOX_COLUMNS)
    blocks = tl.cdiv(K, BLOCK_K)
    steps = taps_h * taps_w * blocks
    share = tl.cdiv(steps, SPLITS)
    split = tl.program_id(1)
    begin = split * share
    full = tl.minimum(begin + share, steps)
    # A class without taps, or with fewer steps than shares, takes one step past the last channel, where zeros are read:
    # a way around the loop would define accumulators without a product, for which ptxas makes every product wait.
    end = tl.maximum(full, begin + 1)
    tl.assume(begin < end)
    tap = begin // blocks
    c, t = (begin - tap * blocks) * BLOCK_K, tap // tl.maximum(taps_w, 1)
    u = tap - t * taps_w
    if TRANSPOSED:
        c = tl.where(begin < full, c, blocks * BLOCK_K)
    products = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(begin, end):
        a_tile = box_tile(
            a, corner_image, corner_row, corner_column, origin_h + t * NEXT_H, origin_w + u * NEXT_W, c, K,
            STEP_H, STEP_W, LIFT, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        column = ((tap_h + t * PERIOD_H) * S + tap_w + u * PERIOD_W) * channels
        if TRANSPOSED:
            w_tile = w.load([c, column + m]).T
        else:
            w_tile = w.load([m, column + c])
        products = tl.dot(w_tile, a_tile.T, products, input_precision=PRECISION)
        c, u, t = next_channels(c, u, t, K, taps_w, BLOCK_K)

    image, row, column, inside = box_pixels(
        corner_image, corner_row, corner_column, images, P, Q, BOX_IMAGES, BOX_ROWS, BOX_COLUMNS
    )
    rows = pixel_offset(image, first_h + row * SPREAD_H, first_w + column * SPREAD_W, stride_on, stride_oh, stride_ow)
    offs_m = m + tl.arange(0, BLOCK_M)
    offsets = rows[None, :] + (offs_m.to(tl.int64) * stride_oc)[:, None]
    mask = inside[None, :] & (offs_m[:, None] < M)
    if SPLITS > 1:
        tl.store(part_ptr + split.to(tl.int64) * total + offsets, products, mask=mask)
    else:
        bias = None
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + offs_m, mask=offs_m < M, other=0.0).to(tl.float32)
        y, kept = _finish(
            products, out, out_saved, bias, offsets, mask, ACTIVATION, PRECISE, DESCRIPTORS_OUT,
            BLOCK_M, BLOCK_N, SUBTILES,
        )  # fmt: skip
        if DESCRIPTORS_OUT:
            corner = [corner_image, corner_row, corner_column, m]
            out.store(corner, y.T.reshape(BOX_IMAGES, BOX_ROWS, BOX_COLUMNS, BLOCK_M))
            if out_saved is not None:
                out_saved.store(corner, kept.T.reshape(BOX_IMAGES, BOX_ROWS, BOX_COLUMNS, BLOCK_M))
        else:
            tl.store(out + offsets, y, mask=mask)
            if out_saved is not None:
                tl.store(out_saved + offsets, kept, mask=mask)


def movable(out: Tensor, a: Tensor, w: Tensor, geometry: Geometry, transposed: bool) -> bool:
    """Whether descriptors can move the source in boxes, and the weights are or can be made a matrix of channels."""
    gpu, g = chip_of(a), geometry
    return (
        gpu.has_descriptors and g.groups == 1 and a.shape[1] >= FEW
        and Source(a, (1, 1) if transposed else g.stride).box
        and (w.stride(1) == 1 or out.numel() // max(out.shape[1], 1) >= FEW_PIXELS)
    )  # fmt: skip


def _matrix(w, step):
    """w (O, C, R, S) -> (O, R * S * channels), channels: a multiple of step. A copy unless it lies so."""
    (O, C, R, S), channels = w.shape, cdiv(w.shape[1], step) * step
    last = w.permute(0, 2, 3, 1)
    if channels != C:
        padded = w.new_zeros(O, R, S, channels)
        padded[..., :C] = last
        last = padded
    last = last.contiguous()
    return (last if last.data_ptr() % 16 == 0 else last.clone()).view(O, R * S * channels), channels


def conv2d_boxes(
    out: Tensor, out_saved: Tensor | None, a: Tensor, w: Tensor, geometry: Geometry, precision: str, *,
    transposed: bool, bias: Tensor | None = None, activation: str | None = None,
    settings: MatmulSettings | None = None,
) -> None:  # fmt: skip
    """As conv2d_gather.gather, for a source that is ``movable``."""
    g, (R, S), itemsize = geometry, w.shape[2:], a.element_size()
    images, M, P, Q = out.shape
    K = a.shape[1]
    classes, rows_p, rows_q = most_of_a_class(geometry, (P, Q), transposed)
    gpu = chip_of(a)
    dot = dot_precision(gpu, precision)
    a_ = Source(a, (1, 1) if transposed else g.stride)
    wide_out = out.stride(1) == 1 and M * itemsize % 16 == 0
    results = (out, out) if keeps_derivative(activation) else (out,)  # kept or not: two forwards are bitwise equal
    problem = Product(
        max(M, 64), images * rows_p * rows_q, max(R * S // classes, 1) * K, itemsize, passes=passes(dot, itemsize),
        descriptors=True, wide_result=wide_out, double=len(results) > 1, finish=INSTRUCTIONS[activation],
        count=classes, traffic=itemsize * sum(t.numel() for t in (a, w, *results)),
    )  # fmt: skip
    settings = settings or fit_step(gather_choice(gpu, problem), K, itemsize)
    box = box_of(images, rows_p, rows_q, settings.BLOCK_N)
    tiles_n = math.prod(cdiv(n, k) for n, k in zip((images, rows_p, rows_q), box, strict=True))
    tiles_m, total = cdiv(M, settings.BLOCK_M), partial_length(out.numel(), 0)
    steps = R * S * cdiv(K, settings.BLOCK_K)
    splits = cdiv(steps, cdiv(steps, settings.SPLITS))  # all of them have work, but in classes with fewer taps
    part = torch.empty(splits, total, dtype=torch.float32, device=a.device) if splits > 1 else None
    descriptors_out = splits == 1 and wide_out and classes == 1 and Source(out).box
    # Whole steps, or transposed whole rows of 16 bytes
    weights, channels = _matrix(w, 16 // itemsize if transposed else settings.BLOCK_K)
    block = [settings.BLOCK_K, settings.BLOCK_M] if transposed else [settings.BLOCK_M, settings.BLOCK_K]

    def result(t):
        if t is None or not descriptors_out:
            return t
        n, _, h, v = t.stride()
        return tensor_descriptor(t, [images, P, Q, M], [n, h, v, 1], [*box, settings.BLOCK_M])

    with on_device_of(a):
        conv2d_boxes_kernel[(classes * tiles_m * tiles_n, splits)](
            result(out), result(out_saved), part, a_.descriptor(box, settings.BLOCK_K),
            tensor_descriptor(weights, list(weights.shape), list(weights.stride()), block), bias,
            *strides_beside(descriptors_out, 4, out),
            images, P, Q, M, K, channels, tiles_m, tiles_n, total,
            R, S, *g.stride, *g.padding, *g.dilation, *inverses(g, transposed), transposed,
            activation, a.dtype == torch.float32, dot, descriptors_out, *box,
            settings.BLOCK_M, settings.BLOCK_N, settings.BLOCK_K, splits, settings.GROUP_M, settings.SUBTILES,
            num_warps=settings.num_warps, num_stages=settings.num_stages,
        )  # fmt: skip
        if splits > 1:
            inner = 1 if out.stride(1) == 1 else P * Q
            reduce_partials(out, out_saved, None, part, bias, activation, a.dtype == torch.float32, inner=inner)
