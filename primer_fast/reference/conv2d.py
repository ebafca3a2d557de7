"""2-D convolution with bias and activation: y = activation(input * weight + bias), the sum of shifted products.

Legend: N images, C input channels, H x W the input's rows and columns, O output channels, R x S the kernel,
P x Q the output's rows and columns.
"""

__all__ = [
    "CASES",
    "REFERENCE",
    "bytes_moved",
    "conv2d",
    "conv2d_grad",
    "conv2d_magnitude",
    "flops",
    "output_size",
    "padding_of",
    "sizes",
]

import math

import numpy as np

from primer_fast.reference.activation import activate, derivative
from primer_fast.reference.case import Case, Reference


def _pair(value):
    return (value, value) if isinstance(value, int) else tuple(value)


def padding_of(kernel, padding, dilation):
    """((before, after) of rows, the same of columns); ``kernel`` (R, S), the others as torch takes them."""
    if padding == "valid":
        return (0, 0), (0, 0)
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(_pair(dilation), kernel, strict=True)]
        return tuple((t // 2, t - t // 2) for t in totals)
    return tuple((p, p) for p in _pair(padding))


def output_size(image, kernel, stride, padding, dilation):
    """(H, W), (R, S) -> (P, Q)."""
    pads, strides, steps = padding_of(kernel, padding, dilation), _pair(stride), _pair(dilation)
    return tuple(
        (n + sum(pad) - d * (k - 1) - 1) // s + 1
        for n, pad, d, k, s in zip(image, pads, steps, kernel, strides, strict=True)
    )


def _batched(a):
    return a if a.ndim == 4 else a[None]


def _taps(input, weight, stride, padding, dilation):
    """Padded input (N, C, H, W), and for each tap (r, s) the slices of rows and columns that it meets."""
    kernel = weight.shape[2:]
    P, Q = output_size(input.shape[2:], kernel, stride, padding, dilation)
    padded = np.pad(input, ((0, 0), (0, 0), *padding_of(kernel, padding, dilation)))
    (u, v), (d, l) = _pair(stride), _pair(dilation)
    slices = {
        (r, s): (slice(r * d, r * d + (P - 1) * u + 1, u), slice(s * l, s * l + (Q - 1) * v + 1, v))
        for r in range(kernel[0])
        for s in range(kernel[1])
    }
    return padded, slices


def _grouped(a, groups, axis):
    """Split the channels on ``axis`` into (groups, channels of a group)."""
    return a.reshape(*a.shape[:axis], groups, a.shape[axis] // groups, *a.shape[axis + 1 :])


def conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, *, activation=None):
    """input (N, C, H, W) or (C, H, W), weight (O, C / groups, R, S), bias (O,) -> (N, O, P, Q) or (O, P, Q)."""
    padded, taps = _taps(_batched(input), weight, stride, padding, dilation)
    filters = _grouped(weight, groups, 0)
    z = np.zeros(()) if bias is None else bias[:, None, None]
    for (r, s), (rows, columns) in taps.items():
        x = _grouped(padded[:, :, rows, columns], groups, 1)
        z = z + np.einsum("ngchw,goc->ngohw", x, filters[..., r, s], optimize=True).reshape(
            len(x), len(weight), *x.shape[3:]
        )
    return activate(z if input.ndim == 4 else z[0], activation)


def conv2d_grad(dy, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, *, activation=None):
    """dy as the output, and the forward's arguments -> gradient of each array argument by name."""
    z = conv2d(input, weight, bias, stride, padding, dilation, groups)
    g = _batched(dy * derivative(z, activation))
    padded, taps = _taps(_batched(input), weight, stride, padding, dilation)
    filters, upstream = _grouped(weight, groups, 0), _grouped(g, groups, 1)
    dx, dw = np.zeros_like(padded), np.zeros_like(weight)
    for (r, s), (rows, columns) in taps.items():
        x = _grouped(padded[:, :, rows, columns], groups, 1)
        dx[:, :, rows, columns] += np.einsum("ngohw,goc->ngchw", upstream, filters[..., r, s], optimize=True).reshape(
            padded[:, :, rows, columns].shape
        )
        dw[:, :, r, s] = np.einsum("ngohw,ngchw->goc", upstream, x, optimize=True).reshape(dw.shape[:2])
    (top, _), (left, _) = padding_of(weight.shape[2:], padding, dilation)
    H, W = input.shape[-2:]
    dx = dx[:, :, top : top + H, left : left + W]
    grads = {"input": dx if input.ndim == 4 else dx[0], "weight": dw}
    return grads if bias is None else {**grads, "bias": g.sum(axis=(0, 2, 3))}


def conv2d_magnitude(dy, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, *, activation=None):
    """Largest sum of absolute products behind each result by name: what a float32 sum's rounding is relative to."""
    dy, *arrays = (np.abs(a) for a in (dy, input, weight, bias) if a is not None)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    sums = {"output": conv2d(*arrays, **options), **conv2d_grad(dy, *arrays, **options)}
    return {name: float(a.max(initial=0.0)) for name, a in sums.items()}


def sizes(case):
    """Case -> (N, C, O, P, Q, R, S, groups)."""
    *lead, C, H, W = case.shapes["input"]
    O, _, R, S = case.shapes["weight"]
    options = {name: case.options.get(name, default) for name, default in _GEOMETRY.items()}
    return math.prod(lead), C, O, *output_size((H, W), (R, S), **options), R, S, case.options.get("groups", 1)


_GEOMETRY = {"stride": 1, "padding": 0, "dilation": 1}


def flops(case):
    """Floating-point operations by pass, a multiply-add counted as two; the backward is two products.

    Products with the zeros of the padding count: they can be left out only at the image's edge.
    """
    N, C, O, P, Q, R, S, groups = sizes(case)
    forward = 2 * N * O * P * Q * (C // groups) * R * S
    return {"forward": forward, "backward": 2 * forward}


def bytes_moved(case, itemsize):
    """Fewest bytes to move by pass: every array read once, every result written once.

    The backward reads dy, input, weight and, with an activation, the saved tensor of the output's size.
    """
    N, _, O, P, Q, *_ = sizes(case)
    operands, result = sum(math.prod(shape) for shape in case.shapes.values()), N * O * P * Q
    read = operands - (O if "bias" in case.shapes else 0)
    saved = result * (case.options.get("activation") is not None)
    return {"forward": itemsize * (operands + result), "backward": itemsize * (result + saved + read + operands)}


def _case(name, why, input, weight, options=None, *, activation=None, bias=True, layouts=None, production=False):
    shapes = {"input": input, "weight": weight} | ({"bias": weight[:1]} if bias else {})
    return Case(name, why, shapes, {**(options or {}), "activation": activation}, layouts or {}, production)


_LAST = {"input": "channels_last", "weight": "channels_last"}


def _resnet(name, why, channels, out_channels, kernel, size, stride=1):
    """A layer of ResNet-50 at batch 64, as torch trains it fastest: channels_last; the norm after it has the bias."""
    return _case(
        f"resnet_{name}", why, (64, channels, size, size), (out_channels, channels, kernel, kernel),
        {"stride": stride, "padding": kernel // 2}, activation="relu", layouts=_LAST, production=True,
    )  # fmt: skip


CASES = (
    _case("primer", "the primer's 5 x 5 image and one kernel", (1, 1, 5, 5), (1, 1, 3, 3), activation="sigmoid"),
    _case("one_channel", "digits: a step of the sum holds several taps", (2, 1, 8, 7), (8, 1, 3, 3), {"padding": 1},
          activation="relu"),
    _case("three_channels", "colour: taps and channels in one step", (2, 3, 7, 8), (8, 3, 3, 3), {"padding": 1},
          activation="gelu"),
    _case("stride", "each remainder of dx has taps of its own", (2, 4, 9, 8), (8, 4, 3, 3), {"stride": 2, "padding": 1},
          activation="silu"),
    _case("stride_over_kernel", "pixels that no tap reaches: their dx is 0", (1, 4, 8, 7), (4, 4, 2, 2), {"stride": 3}),
    _case("asymmetric", "rows and columns differ in kernel, stride and padding", (2, 4, 7, 9), (6, 4, 1, 5),
          {"stride": (2, 1), "padding": (0, 2)}, activation="tanh"),
    _case("dilation", "taps apart", (1, 4, 9, 8), (4, 4, 3, 3), {"padding": 2, "dilation": 2}, activation="leaky_relu"),
    _case("stride_and_dilation", "stride and dilation with and without a common factor", (1, 3, 12, 11), (4, 3, 3, 2),
          {"stride": (3, 2), "padding": (2, 1), "dilation": (2, 4)}, activation="relu"),
    _case("groups", "channels of one group", (2, 8, 5, 4), (12, 4, 3, 2), {"padding": 1, "groups": 2},
          activation="gelu_tanh"),
    _case("groups_wide", "groups of as many channels as a step of the sum", (1, 64, 3, 3), (32, 32, 2, 2),
          {"padding": 1, "groups": 2}, activation="relu", layouts=_LAST),
    _case("depthwise", "two outputs of each channel, stride 2", (1, 2, 5, 6), (4, 1, 2, 2),
          {"stride": 2, "padding": 1, "groups": 2}, activation="silu"),
    _case("depthwise_last", "channels side by side", (2, 24, 4, 5), (24, 1, 2, 2), {"padding": 1, "groups": 24},
          activation="gelu", layouts=_LAST),
    _case("same_even", "an even kernel: one more zero after than before", (2, 3, 6, 7), (4, 3, 4, 2),
          {"padding": "same"}, activation="sigmoid"),
    _case("same_dilated", "zeros of a dilated kernel", (1, 2, 6, 7), (4, 2, 3, 2), {"padding": "same", "dilation": 3}),
    _case("valid", "no padding, by name", (2, 2, 6, 5), (4, 2, 3, 3), {"padding": "valid", "stride": 2}),
    _case("padding_wide", "windows that lie in the padding", (1, 3, 4, 5), (4, 3, 3, 3), {"padding": (3, 4)},
          activation="sigmoid"),
    _case("whole_image", "kernel as large as the image: one output pixel", (3, 8, 4, 4), (8, 8, 4, 4), bias=False),
    _case("channels_last", "boxes with edges inside", (1, 32, 6, 4), (24, 32, 2, 2), {"padding": 1},
          activation="gelu", layouts=_LAST),
    _case("boxes_exact", "boxes that divide the images: dw moves by descriptors too", (4, 32, 4, 4), (16, 32, 2, 2),
          {"padding": "same"}, activation="silu", layouts=_LAST),
    _case("boxes_dilated", "boxes of taps apart, one row of an output", (1, 32, 5, 8), (16, 32, 3, 3), {"dilation": 2},
          activation="relu", layouts=_LAST),
    _case("boxes_stride", "the stride is two axes of the descriptor", (1, 64, 4, 8), (16, 64, 3, 2),
          {"stride": 2, "padding": 1}, activation="relu", layouts=_LAST),
    _case("uneven_channels", "the last step of a tap would reach into the next tap's weights", (1, 40, 5, 4),
          (24, 40, 2, 2), {"padding": 1}, activation="gelu", layouts=_LAST),
    _case("few_framed", "few channels, pixels enough: the taps of a kernel row side by side", (2, 3, 24, 24),
          (8, 3, 3, 3), {"padding": 1}, activation="gelu"),
    _case("few_stride", "the same, an odd number of taps two pixels apart", (1, 3, 65, 70), (8, 3, 5, 7),
          {"stride": 2, "padding": (2, 3)}, activation="relu", layouts=_LAST),
    _case("few_dilated", "five channels, rows of taps apart", (1, 5, 36, 33), (8, 5, 3, 2), {"dilation": (2, 1)}),
    _case("turned", "pixels side by side, and enough of them: copied to channels side by side", (1, 32, 33, 33),
          (8, 32, 2, 2), activation="silu"),
    _case("input_last", "weight contiguous, input not", (1, 32, 5, 4), (16, 32, 2, 2), {"padding": 1},
          layouts={"input": "channels_last"}),
    _case("weight_last", "input contiguous, weight not: the output is channels_last", (1, 32, 5, 4), (16, 32, 2, 2),
          activation="relu", layouts={"weight": "channels_last"}),
    _case("wide_contiguous", "steps of one tap, pixels side by side", (2, 32, 4, 4), (16, 32, 2, 2), activation="gelu"),
    _case("odd_channels", "strides that no descriptor takes", (1, 33, 3, 3), (17, 33, 2, 2), {"padding": 1},
          activation="leaky_relu", layouts=_LAST),
    _case("1x1", "a linear layer of each pixel", (2, 32, 5, 6), (24, 32, 1, 1), activation="gelu", layouts=_LAST),
    _case("1x1_contiguous", "the same, pixels side by side", (2, 32, 5, 6), (8, 32, 1, 1), activation="relu"),
    _case("1x1_stride", "most of dx is 0", (2, 64, 4, 6), (32, 64, 1, 1), {"stride": 2}, layouts=_LAST),
    _case("unbatched", "3-D input: no image axis", (3, 6, 7), (4, 3, 3, 3), {"padding": 1}, activation="relu"),
    _case("no_images", "empty batch", (0, 3, 6, 7), (4, 3, 3, 3), activation="gelu"),
    _case("several_tiles", "tiles with edges in pixels and channels", (2, 3, 8, 7), (20, 3, 2, 2), activation="relu"),
    _case("many_pixels", "the sum over pixels is split", (1, 1, 18, 20), (3, 1, 2, 2), {"padding": 1}),
    _case("long_sum", "few outputs, many channels: the sum over taps is split", (1, 160, 2, 2), (3, 160, 2, 2),
          activation="leaky_relu"),
    _case("input_strided", "every second column", (2, 3, 6, 7), (4, 3, 3, 3), activation="silu",
          layouts={"input": "strided"}),
    _case("input_expanded", "one image repeated by stride 0", (3, 3, 6, 7), (4, 3, 3, 3), activation="relu",
          layouts={"input": "expanded"}),
    _case("offset", "arrays that start off a 16-byte boundary", (1, 32, 4, 4), (8, 32, 2, 2), activation="gelu",
          layouts={"input": "offset", "weight": "offset", "bias": "offset"}),
    _resnet("3x3_64", "ResNet-50, 3 x 3 of stage 1", 64, 64, 3, 56),
    _resnet("3x3_128", "ResNet-50, 3 x 3 of stage 2", 128, 128, 3, 28),
    _resnet("3x3_256", "ResNet-50, 3 x 3 of stage 3", 256, 256, 3, 14),
    _resnet("3x3_512", "ResNet-50, 3 x 3 of stage 4: few pixels, many channels", 512, 512, 3, 7),
    _resnet("3x3_128_half", "ResNet-50, into stage 2: stride 2", 128, 128, 3, 56, 2),
    _resnet("3x3_256_half", "ResNet-50, into stage 3: stride 2", 256, 256, 3, 28, 2),
    _resnet("3x3_512_half", "ResNet-50, into stage 4: stride 2", 512, 512, 3, 14, 2),
    _resnet("stem", "ResNet-50, first layer: three channels, 7 x 7, stride 2", 3, 64, 7, 224, 2),
    _resnet("1x1_64_64", "ResNet-50, first 1 x 1 of stage 1", 64, 64, 1, 56),
    _resnet("1x1_64_256", "ResNet-50, 1 x 1 up of stage 1", 64, 256, 1, 56),
    _resnet("1x1_256_64", "ResNet-50, 1 x 1 down of stage 1", 256, 64, 1, 56),
    _resnet("1x1_256_128", "ResNet-50, 1 x 1 down into stage 2", 256, 128, 1, 56),
    _resnet("1x1_128_512", "ResNet-50, 1 x 1 up of stage 2", 128, 512, 1, 28),
    _resnet("1x1_512_128", "ResNet-50, 1 x 1 down of stage 2", 512, 128, 1, 28),
    _resnet("1x1_512_256", "ResNet-50, 1 x 1 down into stage 3", 512, 256, 1, 28),
    _resnet("1x1_256_1024", "ResNet-50, 1 x 1 up of stage 3", 256, 1024, 1, 14),
    _resnet("1x1_1024_256", "ResNet-50, 1 x 1 down of stage 3", 1024, 256, 1, 14),
    _resnet("1x1_1024_512", "ResNet-50, 1 x 1 down into stage 4", 1024, 512, 1, 14),
    _resnet("1x1_512_2048", "ResNet-50, 1 x 1 up of stage 4", 512, 2048, 1, 7),
    _resnet("1x1_2048_512", "ResNet-50, 1 x 1 down of stage 4", 2048, 512, 1, 7),
    _resnet("skip_256_512", "ResNet-50, skip into stage 2: 1 x 1, stride 2", 256, 512, 1, 56, 2),
    _resnet("skip_512_1024", "ResNet-50, skip into stage 3: 1 x 1, stride 2", 512, 1024, 1, 28, 2),
    _resnet("skip_1024_2048", "ResNet-50, skip into stage 4: 1 x 1, stride 2", 1024, 2048, 1, 14, 2),
    _case("mnist_first", "the digit CNN's first layer: one channel", (256, 1, 28, 28), (32, 1, 3, 3), {"padding": 1},
          activation="relu", production=True),
    _case("mnist_second", "the digit CNN's second layer, NCHW", (256, 32, 14, 14), (64, 32, 3, 3), {"padding": 1},
          activation="relu", production=True),
    _case("depthwise_mobile", "MobileNet's depthwise layer", (64, 384, 14, 14), (384, 1, 3, 3),
          {"padding": 1, "groups": 384}, activation="relu", layouts=_LAST, production=True),
)  # fmt: skip

REFERENCE = Reference("conv2d", conv2d, conv2d_grad, conv2d_magnitude, flops, bytes_moved, CASES)
