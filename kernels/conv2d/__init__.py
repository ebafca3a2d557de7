"""Two-dimensional convolution: bias and activation in the forward's kernel, and its two backward products.

    z[n, o, p, q] = b[o] + sum over c, r, s of x[n, c, p u - e + r d, q v - f + s l] w[o, c, r, s]     y = activation(z)
    g  = dy * activation'(z)
    dx[n, c, i, j] = sum of g[n, o, p, q] w[o, c, r, s] over all o, r, s, p, q with p u - e + r d = i, q v - f + s l = j
    dw[o, c, r, s] = sum over n, p, q of g[n, o, p, q] x[n, c, p u - e + r d, q v - f + s l]
    db[o]          = sum over n, p, q of g[n, o, p, q]

(u, v) stride, (e, f) padding, (d, l) dilation; x is zero outside the image. With G groups, o and c run over one group.
Implicit matrix products: what a product reads is gathered from x or g on the way in, and never in memory as a matrix.

    product   rows            columns            summed over       gathered
    y         n, p, q         o of a group       r, s, c           x
    dx        n, i, j         c of a group       r, s, o           g
    dw        o of a group    r, s, c            n, p, q           x

Taps and channels are one loop: a step is BLOCK_K channels of one tap, or, with few channels, of several. For dx the
pixels (i, j) are taken by their remainders modulo the stride: equal ones are reached by the same taps, so none of the
zeros between strides is multiplied. prepass.py makes g, and db with it: the products would make it again for each tap.
x is read in the layout that it has; weights whose channels are not adjacent are copied where that pays. Zeros of the
padding are multiplied as values: an infinite weight next to them makes NaN.

On GPUs with a tensor memory accelerator, aligned channels_last tensors without groups move by descriptors: boxes of
images x rows x columns, whose part outside the image the hardware fills with zeros (boxes.py). A stride is two
more axes of the descriptor. Others are copied to that layout where it pays. The taps of few channels are put side by
side (few.py). Everything else is gathered by pointers (gather.py). 1 x 1 kernels on channels_last
tensors are linear layers of the pixels, and linear.py computes them; depthwise ones have no sum over channels, and
depthwise.py computes them without tensor cores.

FLOPs: 2 rows x columns x summed each. Traffic: every tensor once, as long as the taps of a tile stay in L2.
A sum split over programs goes through float32 partial sums, added in a fixed order: two runs are bitwise equal.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..activation import FROM_OUTPUT, keeps_derivative
from ..device import chip_of
from ..linear import linear_bwd, linear_bwd_input, linear_bwd_weight, linear_fwd
from ..prepass import prepass
from ..product import MatmulSettings
from .boxes import conv2d_boxes, movable
from .depthwise import conv2d_depthwise, conv2d_depthwise_weight, is_depthwise
from .few import conv2d_few, conv2d_few_weight, suits
from .gather import conv2d_gather
from .geometry import FEW, FEW_PIXELS, FILL, dense_channels_last
from .geometry import Geometry as Geometry
from .weight import conv2d_weight


def _pixel_rows(t):
    """t (N, C, H, W) viewed as (N * H * W, C); None where its strides do not allow a view."""
    (N, C, H, W), (n, c, h, w) = t.shape, t.stride()
    step = w if W > 1 else h if H > 1 else n
    if (H > 1 and h != W * step) or (N > 1 and n != H * W * step):
        return None
    return t.as_strided((N * H * W, C), (step, c))


def _images(rows, images, size):
    """Undo ``_pixel_rows``: rows as images in channels_last, None as None."""
    return None if rows is None else rows.view(images, *size, -1).permute(0, 3, 1, 2)


def _as_linear(geometry, w, *tensors):
    """The tensors as matrices of pixels x channels where the convolution is a linear layer of each pixel, else None."""
    g = geometry
    if w.shape[2:] != (1, 1) or g.stride != (1, 1) or g.padding != (0, 0) or g.groups != 1:
        return None
    if any(t is not None and (not dense_channels_last(t) or t.shape[2:] != g.size) for t in tensors):
        return None
    rows = [None if t is None else _pixel_rows(t) for t in tensors]
    return None if any(r is None and t is not None for r, t in zip(rows, tensors, strict=True)) else rows


def conv2d_fwd(
    x: Tensor, w: Tensor, b: Tensor | None, geometry: Geometry, activation: str | None, keep: bool, precision: str,
    channels_last: bool, settings: MatmulSettings | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """x (N, C, H, W), w (O, C / groups, R, S), b (O,) or None -> y (N, O, *size), what the backward needs or None.

    keep: whether a backward will come. precision: torch's float32 matmul precision. channels_last: the layout of y.
    """
    matrices = _as_linear(geometry, w, x) if channels_last else None
    if matrices is not None:
        rows, saved_rows = linear_fwd(matrices[0], w[:, :, 0, 0], b, activation, keep, precision, settings)
        y = _images(rows, x.shape[0], geometry.size)
        return y, y if saved_rows is rows else _images(saved_rows, x.shape[0], geometry.size)
    y = torch.empty(
        (x.shape[0], w.shape[0], *geometry.size), dtype=x.dtype, device=x.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )  # fmt: skip
    saved = torch.empty_like(y) if keep and keeps_derivative(activation) else None
    if is_depthwise(geometry, w):
        conv2d_depthwise(y, saved, x, w, geometry, transposed=False, bias=b, activation=activation)
    elif suits(x, w, geometry):
        conv2d_few(y, saved, x, w, geometry, precision, bias=b, activation=activation, settings=settings)
    else:
        _product(y, saved, x, w, geometry, precision, False, settings, bias=b, activation=activation)
    return y, (y if keep and activation in FROM_OUTPUT else saved)


def _product(out, out_saved, a, w, geometry, precision, transposed, settings, **finish):
    a = _channels_last(a, out)
    by = conv2d_boxes if movable(out, a, w, geometry, transposed) else conv2d_gather
    by(out, out_saved, a, w, geometry, precision, transposed=transposed, settings=settings, **finish)


def conv2d_bwd_input(
    g: Tensor, x: Tensor, w: Tensor, geometry: Geometry, precision: str, settings: MatmulSettings | None = None
) -> Tensor:
    """g (N, O, P, Q) -> dx in x's shape, dtype and layout; x's values are not read. Not for depthwise convolutions."""
    matrices = _as_linear(geometry, w, g) if dense_channels_last(x) else None
    if matrices is not None:
        rows = linear_bwd_input(matrices[0], None, w[:, :, 0, 0], None, precision, settings)
        return rows.as_strided(x.shape, x.stride())
    dx = torch.empty_like(x)
    _product(dx, None, g, w, geometry, precision, True, settings)
    return dx


def conv2d_bwd_weight(
    g: Tensor, x: Tensor, w: Tensor, geometry: Geometry, precision: str, settings: MatmulSettings | None = None
) -> Tensor:
    """g (N, O, P, Q), x -> dw in w's shape and layout; w's values are not read. Not for depthwise convolutions."""
    matrices = _as_linear(geometry, w, g, x)
    if matrices is not None:
        dw, _ = linear_bwd_weight(matrices[0], None, matrices[1], None, None, precision, settings, FILL)
        return _like(w, dw)
    dw = torch.empty_like(w)
    if suits(x, w, geometry):
        conv2d_few_weight(dw, g, x, geometry, precision, settings)
    else:
        conv2d_weight(dw, g, _channels_last(x, g), geometry, precision, settings)
    return dw


def _channels_last(t, other):
    """t (N, C, H, W), copied to channels_last where descriptors can then move it and the sizes are worth a copy."""
    pixels = other.numel() // max(other.shape[1], 1)
    worth = chip_of(t).has_descriptors and t.shape[1] >= FEW and pixels >= FEW_PIXELS
    return t.contiguous(memory_format=torch.channels_last) if worth and t.stride(1) != 1 else t


def _like(w, dw):
    """dw (O, C) of a 1 x 1 kernel in the shape and layout of w."""
    return dw.as_strided(w.shape, w.stride() if w.is_contiguous() else torch.empty_like(w).stride())


def conv2d_bwd(
    dy: Tensor, saved: Tensor | None, x: Tensor, w: Tensor, geometry: Geometry, activation: str | None,
    needed: Sequence[bool], precision: str,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dy, saved (N, O, P, Q) -> dx, dw, db (O,) in w.dtype; None for each that is not needed, in the same order."""
    need_x, need_w, need_b = needed
    dx = dw = db = None
    matrices = _as_linear(geometry, w, saved, x)
    if matrices is not None:  # whatever dy's layout is: a sum must not differ with it
        dy_rows = _pixel_rows(dy.contiguous(memory_format=torch.channels_last))
        rows, dw, db = linear_bwd(dy_rows, *matrices, w[:, :, 0, 0], activation, needed, precision, FILL)
        return rows if rows is None else rows.as_strided(x.shape, x.stride()), None if dw is None else _like(w, dw), db
    if is_depthwise(geometry, w):
        if need_x:
            dx = torch.empty_like(x)
            conv2d_depthwise(dx, None, dy, w, geometry, transposed=True, saved=saved, gradient_of=activation)
        if need_w or need_b:
            dw, db = torch.empty_like(w), w.new_empty(w.shape[0]) if need_b else None
            conv2d_depthwise_weight(dw, db, dy, saved, x, geometry, activation)
        return dx, dw if need_w else None, db
    if activation is not None or need_b:
        rows, db = prepass(_pixels(dy), _pixels(saved), activation, w.dtype if need_b else None)
        dy = dy if rows is None else _images(rows, x.shape[0], geometry.size)
    if need_x:
        dx = conv2d_bwd_input(dy, x, w, geometry, precision)
    if need_w:
        dw = conv2d_bwd_weight(dy, x, w, geometry, precision)
    return dx, dw, db


def _pixels(t):
    """t (N, C, H, W) or None as (N, H * W, C), a copy where its strides do not allow that."""
    return None if t is None else t.flatten(2).transpose(1, 2)
