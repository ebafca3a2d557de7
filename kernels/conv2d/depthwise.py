"""Depthwise convolution, without tensor cores: every output channel sees one input channel; see kernels/conv2d.py."""

import math
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..activation import activate, backpropagate
from ..device import Chip, cdiv, chip_of, on_device_of
from ..launch.entry import entry
from ..partials import partial_length, reduce_partials
from ..tunable import Choice, bucket_of
from .geometry import Geometry, flat_pixels, inverses, most_of_a_class, numbers_are_large, pixel_offset, walk


@entry
def conv2d_depthwise_kernel(
    out_ptr, out_saved_ptr,  # results
    a_ptr, saved_ptr, b_ptr, bias_ptr,
    strides_a, strides_saved,  # between images, channels, rows, columns, in elements
    strides_b,  # between output channels, tap rows, tap columns
    strides_out,  # as of a
    images, P, Q, H, W, channels,  # rows and columns of the result, of the source; channels of the result
    tiles_p,  # pixel tiles of a class
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    PERIOD_H: tl.constexpr, PERIOD_W: tl.constexpr, INVERSE_H: tl.constexpr, INVERSE_W: tl.constexpr,
    MULTIPLIER: tl.constexpr, TRANSPOSED: tl.constexpr,  # output channels of an input channel; y or dx
    ACTIVATION: tl.constexpr, GRADIENT_OF: tl.constexpr, PRECISE: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_P pixels of one class, BLOCK_C channels of the result; classes as in gather.py."""
    stride_an, stride_ac, stride_ah, stride_aw = strides_a
    stride_sn, stride_sc, stride_sh, stride_sw = strides_saved
    stride_on, stride_oc, stride_oh, stride_ow = strides_out
    stride_bn, stride_br, stride_bs = strides_b
    blocks = tl.cdiv(channels, BLOCK_C)
    tile = tl.program_id(0) // blocks
    c = (tl.program_id(0) - tile * blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    remainder = tile // tiles_p
    first_h, tap_h, taps_h, origin_h, P = walk(
        remainder // STRIDE_W, P, PAD_H, STRIDE_H, DILATION_H, R, PERIOD_H, INVERSE_H, TRANSPOSED
    )
    first_w, tap_w, taps_w, origin_w, Q = walk(
        remainder % STRIDE_W, Q, PAD_W, STRIDE_W, DILATION_W, S, PERIOD_W, INVERSE_W, TRANSPOSED
    )
    STEP_H: tl.constexpr = 1 if TRANSPOSED else STRIDE_H
    STEP_W: tl.constexpr = 1 if TRANSPOSED else STRIDE_W
    NEXT_H: tl.constexpr = -(DILATION_H * PERIOD_H // STRIDE_H) if TRANSPOSED else DILATION_H
    NEXT_W: tl.constexpr = -(DILATION_W * PERIOD_W // STRIDE_W) if TRANSPOSED else DILATION_W
    SPREAD_H: tl.constexpr = STRIDE_H if TRANSPOSED else 1
    SPREAD_W: tl.constexpr = STRIDE_W if TRANSPOSED else 1
    SUMMED: tl.constexpr = MULTIPLIER if TRANSPOSED else 1  # source channels that a result's channel sees

    image, row, column, inside = flat_pixels(tile - remainder * tiles_p, images, P, Q, LARGE, BLOCK_P)
    h, w = row * STEP_H + origin_h, column * STEP_W + origin_w
    a_rows = pixel_offset(image, h, w, stride_an, stride_ah, stride_aw)
    saved_rows = pixel_offset(image, h, w, stride_sn, stride_sh, stride_sw)
    z = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    for step in range(taps_h * taps_w * SUMMED):
        tap = step // SUMMED
        t = tap // taps_w
        u = tap - t * taps_w
        if TRANSPOSED:
            b_channel = c * MULTIPLIER + (step - tap * SUMMED)
            a_channel = b_channel.to(tl.int64)
        else:
            b_channel = c
            a_channel = (c // MULTIPLIER).to(tl.int64)
        r, s = (tap_h + t * PERIOD_H).to(tl.int64), (tap_w + u * PERIOD_W).to(tl.int64)
        move_h, move_w = t * NEXT_H, u * NEXT_W
        there = inside & (h + move_h >= 0) & (h + move_h < H) & (w + move_w >= 0) & (w + move_w < W)
        mask = there[:, None] & (c < channels)[None, :]
        move_h, move_w = move_h.to(tl.int64), move_w.to(tl.int64)
        offsets = a_channel * stride_ac + move_h * stride_ah + move_w * stride_aw
        a = tl.load(a_ptr + (a_rows[:, None] + offsets[None, :]), mask=mask, other=0.0).to(tl.float32)
        if GRADIENT_OF is not None:
            offsets = a_channel * stride_sc + move_h * stride_sh + move_w * stride_sw
            saved = tl.load(saved_ptr + (saved_rows[:, None] + offsets[None, :]), mask=mask, other=0.0)
            a = backpropagate(a, saved.to(tl.float32), GRADIENT_OF)
        b_offsets = b_channel.to(tl.int64) * stride_bn + r * stride_br + s * stride_bs
        b = tl.load(b_ptr + b_offsets, mask=c < channels, other=0.0).to(tl.float32)
        z += a * b[None, :]

    if bias_ptr is not None:
        z += tl.load(bias_ptr + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
    y, kept = activate(z, ACTIVATION, PRECISE)
    rows = pixel_offset(image, first_h + row * SPREAD_H, first_w + column * SPREAD_W, stride_on, stride_oh, stride_ow)
    offsets = rows[:, None] + (c.to(tl.int64) * stride_oc)[None, :]
    mask = inside[:, None] & (c < channels)[None, :]
    tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=mask)
    if out_saved_ptr is not None:
        tl.store(out_saved_ptr + offsets, kept.to(out_saved_ptr.dtype.element_ty), mask=mask)


@entry
def conv2d_depthwise_weight_kernel(
    part_ptr,  # (splits, total) float32: out in its memory order, then the sums
    dy_ptr, saved_ptr, x_ptr,
    strides_dy, strides_saved, strides_x,  # between images, channels, rows, columns, in elements
    strides_out,  # between output channels, tap rows, tap columns
    images, P, Q, H, W, channels,  # rows and columns of dy, of x; channels of dy
    tiles_p, share, numel, total,  # pixel tiles, in all and of a split
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    MULTIPLIER: tl.constexpr, GRADIENT_OF: tl.constexpr, SUMS: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program (t, s): share s of the sum over all pixels; t: one tap, BLOCK_C channels."""
    stride_yn, stride_yc, stride_yh, stride_yw = strides_dy
    stride_sn, stride_sc, stride_sh, stride_sw = strides_saved
    stride_xn, stride_xc, stride_xh, stride_xw = strides_x
    stride_on, stride_or, stride_os = strides_out
    blocks = tl.cdiv(channels, BLOCK_C)
    tap = tl.program_id(0) // blocks
    c = (tl.program_id(0) - tap * blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    r = tap // S
    s = tap - r * S
    split = tl.program_id(1)
    y_channel, x_channel = c.to(tl.int64), (c // MULTIPLIER).to(tl.int64)
    products = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    sums = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    for step in range(split * share, tl.minimum((split + 1) * share, tiles_p)):
        image, row, column, inside = flat_pixels(step, images, P, Q, LARGE, BLOCK_P)
        h, w = row * STRIDE_H + (r * DILATION_H - PAD_H), column * STRIDE_W + (s * DILATION_W - PAD_W)
        mask = inside[:, None] & (c < channels)[None, :]
        pixels = pixel_offset(image, row, column, stride_yn, stride_yh, stride_yw)
        g = tl.load(dy_ptr + (pixels[:, None] + (y_channel * stride_yc)[None, :]), mask=mask, other=0.0)
        g = g.to(tl.float32)
        if GRADIENT_OF is not None:
            pixels = pixel_offset(image, row, column, stride_sn, stride_sh, stride_sw)
            saved = tl.load(saved_ptr + (pixels[:, None] + (y_channel * stride_sc)[None, :]), mask=mask, other=0.0)
            g = backpropagate(g, saved.to(tl.float32), GRADIENT_OF)
        mask = mask & ((h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None]
        pixels = pixel_offset(image, h, w, stride_xn, stride_xh, stride_xw)
        x = tl.load(x_ptr + (pixels[:, None] + (x_channel * stride_xc)[None, :]), mask=mask, other=0.0)
        products += g * x.to(tl.float32)
        if SUMS:
            sums += g

    part_ptr += split.to(tl.int64) * total
    offsets = y_channel * stride_on + r.to(tl.int64) * stride_or + s.to(tl.int64) * stride_os
    tl.store(part_ptr + offsets, tl.sum(products, axis=0), mask=c < channels)
    if SUMS:
        tl.store(part_ptr + numel + c, tl.sum(sums, axis=0), mask=(c < channels) & (tap == 0))


def is_depthwise(geometry: Geometry, w: Tensor) -> bool:
    return geometry.groups > 1 and w.shape[1] == 1 and w.shape[0] < 16 * geometry.groups


class DepthwiseSettings(NamedTuple):
    """Pixels and channels of a tile, and the warps that share it."""

    BLOCK_P: int
    BLOCK_C: int
    num_warps: int


class DepthwiseProblem(NamedTuple):
    """What DepthwiseSettings depend on."""

    pixels: int  # of the result; for the gradient of the weights, those that are summed over
    channels: int
    itemsize: int  # of an element, in bytes
    adjacent: bool  # the channels are adjacent in memory, else the pixels
    taps: int


def depthwise_default(gpu: Chip, p: DepthwiseProblem) -> DepthwiseSettings:
    """Tiles along the axis that is adjacent in memory, so that threads read neighbours."""
    return DepthwiseSettings(32, 64, 4) if p.adjacent else DepthwiseSettings(512, 1, 4)


def depthwise_bucket(p: DepthwiseProblem) -> str:
    return bucket_of(p.pixels, p.channels, item=p.itemsize, adjacent=p.adjacent, taps=p.taps)


def depthwise_fits(gpu: Chip, p: DepthwiseProblem, s: DepthwiseSettings) -> bool:
    """Whether a thread has at most 32 sums, and its neighbour the next element in memory."""
    held = s.BLOCK_P * s.BLOCK_C / (s.num_warps * (64 if gpu.is_amd else 32))
    return 1 <= held <= 32 and (s.BLOCK_C >= 32 if p.adjacent else s.BLOCK_C == 1)


depthwise_choice = Choice("conv2d_depthwise", DepthwiseSettings, depthwise_bucket, depthwise_fits, depthwise_default)
depthwise_weight_choice = Choice(
    "conv2d_depthwise_weight", DepthwiseSettings, depthwise_bucket, depthwise_fits, depthwise_default
)


def conv2d_depthwise(
    out: Tensor, out_saved: Tensor | None, a: Tensor, w: Tensor, geometry: Geometry, *, transposed: bool,
    bias: Tensor | None = None, activation: str | None = None, saved: Tensor | None = None,
    gradient_of: str | None = None,
) -> None:  # fmt: skip
    """As ``gather`` for a depthwise convolution; float32 sums without tensor cores."""
    g = geometry
    images, channels, P, Q = out.shape
    classes, rows_p, rows_q = most_of_a_class(geometry, (P, Q), transposed)
    rows = images * rows_p * rows_q
    adjacent, taps = a.stride(1) == 1, math.prod(w.shape[2:])
    settings = depthwise_choice(chip_of(a), DepthwiseProblem(rows, channels, a.element_size(), adjacent, taps))
    tiles_p = cdiv(rows, settings.BLOCK_P)
    of_o, _, of_r, of_s = w.stride()
    with on_device_of(a):
        conv2d_depthwise_kernel[(classes * tiles_p * cdiv(channels, settings.BLOCK_C),)](
            out, out_saved, a, saved, w, bias,
            a.stride(), (0, 0, 0, 0) if saved is None else saved.stride(), (of_o, of_r, of_s), out.stride(),
            images, P, Q, *a.shape[2:], channels, tiles_p,
            *w.shape[2:], *g.stride, *g.padding, *g.dilation, *inverses(g, transposed),
            w.shape[0] // g.groups, transposed, activation, gradient_of, a.dtype == torch.float32,
            numbers_are_large(rows), settings.BLOCK_P, settings.BLOCK_C, num_warps=settings.num_warps,
        )  # fmt: skip


def conv2d_depthwise_weight(
    out: Tensor, sums: Tensor | None, dy: Tensor, saved: Tensor | None, x: Tensor, geometry: Geometry,
    activation: str | None,
) -> None:  # fmt: skip
    """out: gradient of the weights, sums: of the bias or None."""
    g, (O, _, R, S) = geometry, out.shape
    images, _, P, Q = dy.shape
    problem = DepthwiseProblem(images * P * Q, O, dy.element_size(), dy.stride(1) == 1, R * S)
    settings = depthwise_weight_choice(chip_of(dy), problem)
    programs, steps = R * S * cdiv(O, settings.BLOCK_C), cdiv(images * P * Q, settings.BLOCK_P)
    splits = max(1, min(cdiv(4 * chip_of(dy).processors, programs), cdiv(steps, 4), 64))
    part = torch.empty(splits, partial_length(out.numel(), O), dtype=torch.float32, device=dy.device)
    of_o, _, of_r, of_s = out.stride()
    with on_device_of(dy):
        conv2d_depthwise_weight_kernel[(programs, splits)](
            part, dy, saved, x,
            dy.stride(), (0, 0, 0, 0) if saved is None else saved.stride(), x.stride(), (of_o, of_r, of_s),
            images, P, Q, *x.shape[2:], O, steps, cdiv(steps, splits), out.numel(), part.shape[1],
            R, S, *g.stride, *g.padding, *g.dilation, O // g.groups, activation, sums is not None,
            numbers_are_large(images * P * Q), settings.BLOCK_P, settings.BLOCK_C, num_warps=settings.num_warps,
        )  # fmt: skip
        reduce_partials(out, None, sums, part, None, None, True)
