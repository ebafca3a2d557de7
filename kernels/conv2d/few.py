"""Convolution of few channels: the taps of one kernel row lie side by side, as one channel; kernels/conv2d/ launches.

An image of three channels has no 16 bytes that belong to one pixel, and every element would be loaded by itself. A copy
with the channels filled up to four, the rows framed by the padding's zeros, has S * 4 adjacent elements for the S taps
of a kernel row. Seen with a step of one output pixel, which overlaps the next, it is the source of a convolution with
an R x 1 kernel and without padding, which the same kernels compute. The elements between C and four meet zeros.

Traffic: 4 / C times the source, written and read, beside what the convolution moves.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import cdiv, on_device_of
from ..launch.entry import entry
from ..product import MatmulSettings
from .gather import conv2d_gather
from .geometry import FEW, FEW_PIXELS, Geometry
from .weight import conv2d_weight


@entry
def conv2d_frame_kernel(
    out_ptr, x_ptr,  # (images, rows, columns, CHANNELS) contiguous; (images, C, H, W)
    stride_xn, stride_xc, stride_xh, stride_xw, C, H, W, rows, columns,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (l, j): block j of line l, which is a row of an image."""
    line = tl.program_id(0)
    image, h = line // rows, line % rows - PAD_H
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    c, w = i % CHANNELS, i // CHANNELS - PAD_W
    inside = (c < C) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    x_ptr += image.to(tl.int64) * stride_xn + h.to(tl.int64) * stride_xh
    x = tl.load(x_ptr + c.to(tl.int64) * stride_xc + w.to(tl.int64) * stride_xw, mask=inside, other=0.0)
    tl.store(out_ptr + line.to(tl.int64) * (columns * CHANNELS) + i, x, mask=i < columns * CHANNELS)


def _filled(channels):
    """Channels of the copy: four, or a multiple of eight."""
    return 4 if channels <= 4 else cdiv(channels, 8) * 8


def _framed(x, geometry, R, S):
    """x (N, C, H, W) -> (N, S * filled, rows, Q): element (n, (s, c), i, q) is the copy's at row i, column q v + s."""
    (images, C, H, W), (P, Q), (u, v) = x.shape, geometry.size, geometry.stride
    filled = _filled(C)
    rows = (P - 1) * u + (R - 1) * geometry.dilation[0] + 1
    columns = cdiv(((Q - 1) * v + S) * filled, 16) * 16 // filled
    copy = torch.empty(images, rows, columns, filled, dtype=x.dtype, device=x.device)
    block = min(1024, triton.next_power_of_2(columns * filled))
    with on_device_of(x):
        conv2d_frame_kernel[(images * rows, cdiv(columns * filled, block))](
            copy, x, *x.stride(), C, H, W, rows, columns, *geometry.padding, filled, block, num_warps=4
        )  # fmt: skip
    line = columns * filled
    return copy.as_strided((images, S * filled, rows, Q), (rows * line, 1, line, v * filled))


def _of_rows(geometry):
    """The geometry of the convolution with an R x 1 kernel."""
    (u, _), (d, _) = geometry.stride, geometry.dilation
    return geometry._replace(stride=(u, 1), padding=(0, 0), dilation=(d, 1))


def suits(x: Tensor, w: Tensor, geometry: Geometry) -> bool:
    """Whether x has few channels, and enough pixels to be worth the copy."""
    return (
        x.shape[1] < FEW and geometry.groups == 1 and geometry.dilation[1] == 1
        and x.shape[0] * geometry.size[0] * geometry.size[1] >= FEW_PIXELS
    )  # fmt: skip


def conv2d_few(
    y: Tensor, saved: Tensor | None, x: Tensor, w: Tensor, geometry: Geometry, precision: str, *, bias: Tensor | None,
    activation: str | None, settings: MatmulSettings | None = None,
) -> None:  # fmt: skip
    """As conv2d_gather.gather, not transposed, for a convolution that ``suits``."""
    O, C, R, S = w.shape
    filled = _filled(C)
    line = cdiv(S * filled, 16) * 16
    rows = w.new_zeros(O, R, line)
    rows[..., : S * filled].unflatten(2, (S, filled))[..., :C] = w.permute(0, 2, 3, 1)
    rows = rows.as_strided((O, S * filled, R, 1), (R * line, 1, line, line))
    conv2d_gather(
        y, saved, _framed(x, geometry, R, S), rows, _of_rows(geometry), precision,
        transposed=False, bias=bias, activation=activation, settings=settings, lines=True,
    )  # fmt: skip


def conv2d_few_weight(
    dw: Tensor, g: Tensor, x: Tensor, geometry: Geometry, precision: str, settings: MatmulSettings | None = None
) -> None:
    """As conv2d_weight.weight, for a convolution that ``suits``."""
    O, C, R, S = dw.shape
    filled = _filled(C)
    rows = torch.empty(O, R, S * filled, dtype=dw.dtype, device=dw.device)
    conv2d_weight(
        rows.transpose(1, 2)[..., None], g, _framed(x, geometry, R, S), _of_rows(geometry), precision, settings,
        lines=True,
    )  # fmt: skip
    dw.copy_(rows.unflatten(2, (S, filled))[..., :C].permute(0, 3, 1, 2))
