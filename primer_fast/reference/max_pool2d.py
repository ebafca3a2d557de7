"""Max-pooling: the largest element of each window of an image, and which one it is.

Legend: C channels, H x W pixels, (OH, OW) output pixels. Lead axes: (N, C), or (C,) for one image.
"""

__all__ = [
    "CASES",
    "REFERENCE",
    "bytes_moved",
    "flops",
    "max_pool2d",
    "max_pool2d_grad",
    "max_pool2d_magnitude",
    "sizes",
]

import math

import numpy as np

from primer_fast.reference.case import Case, Reference


def _pair(value):
    return tuple(value) if isinstance(value, tuple | list) else (value, value)


def _windows(size, kernel, stride, padding, dilation, ceil_mode):
    """One axis -> positions (windows, kernel) in the image; negative or past its end in the padding."""
    last = size + 2 * padding - dilation * (kernel - 1) - 1  # where the last whole window starts, from the padding on
    count = last // stride + 1
    if ceil_mode and last % stride and count * stride < size + padding:
        count += 1  # a partial window that starts in the image or in the padding before it
    return np.arange(count)[:, None] * stride - padding + np.arange(kernel) * dilation


def _axes(shape, kernel_size, stride, padding, dilation, ceil_mode):
    settings = (_pair(v) for v in (kernel_size, kernel_size if stride is None else stride, padding, dilation))
    return [_windows(n, k, s, p, d, ceil_mode) for n, k, s, p, d in zip(shape[-2:], *settings, strict=True)]


def _winners(input, rows, columns):
    """-> largest values (..., OH, OW) and their indices h * W + w: the first of equals, the last NaN."""
    H, W = input.shape[-2:]
    shape = (*input.shape[:-2], len(rows), len(columns))
    best, indices = np.full(shape, -np.inf), np.full(shape, -1)
    for i in range(rows.shape[1]):
        for j in range(columns.shape[1]):
            h, w = rows[:, i, None], columns[None, :, j]
            there = (h >= 0) & (h < H) & (w >= 0) & (w < W)
            values = input[..., np.clip(h, 0, H - 1), np.clip(w, 0, W - 1)]
            wins = there & ((values > best) | np.isnan(values) | (indices < 0))
            best, indices = np.where(wins, values, best), np.where(wins, h * W + w, indices)
    return best, indices


def max_pool2d(
    input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
):  # fmt: skip
    """input (N, C, H, W) or (C, H, W) -> (..., OH, OW), with their indices in an image if asked for."""
    best, indices = _winners(input, *_axes(input.shape, kernel_size, stride, padding, dilation, ceil_mode))
    return (best, indices) if return_indices else best


def max_pool2d_grad(dy, input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False):
    """dy (..., OH, OW) and the forward's arguments -> gradient of the array argument by name."""
    _, indices = _winners(input, *_axes(input.shape, kernel_size, stride, padding, dilation, ceil_mode))
    planes, pixels = math.prod(input.shape[:-2]), math.prod(input.shape[-2:])
    dx = np.zeros((planes, pixels))
    outputs = math.prod(indices.shape[-2:])
    indices, dy = indices.reshape(planes, outputs), dy.reshape(planes, outputs)
    np.add.at(dx, (np.arange(planes)[:, None], indices), np.where(indices < 0, 0, dy))  # a window without a pixel
    return {"input": dx.reshape(input.shape)}


def max_pool2d_magnitude(dy, input, *args, **options):
    """Largest sum of absolute values behind each result by name; the output is copied, not summed."""
    return {"output": 0.0, "input": float(max_pool2d_grad(np.abs(dy), input, *args, **options)["input"].max(initial=0))}


def sizes(case):
    """Case -> elements of the input, elements of the output, elements of a window."""
    shape = case.shapes["input"]
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    defaults = (None, None, 0, 1, False)
    options = [case.options.get(name, default) for name, default in zip(names, defaults, strict=True)]
    rows, columns = _axes(shape, *options)
    return math.prod(shape), math.prod(shape[:-2]) * len(rows) * len(columns), rows.shape[1] * columns.shape[1]


def flops(case):
    """Operations by pass: a comparison for every element of every window; one addition for every output."""
    _, outputs, window = sizes(case)
    return {"forward": outputs * window, "backward": outputs}


def bytes_moved(case, itemsize):
    """Fewest bytes to move by pass: every array read once, every result written once.

    The backward reads the upstream gradient and a byte per output that says which element won; the forward before it
    writes those bytes, which are counted here.
    """
    inputs, outputs, _ = sizes(case)
    return {"forward": itemsize * (inputs + outputs), "backward": itemsize * (inputs + outputs) + 2 * outputs}


def _case(name, why, shape, kernel_size, *, layout=None, production=False, **options):
    layouts = {} if layout is None else {"input": layout}
    return Case(name, why, {"input": shape}, {"kernel_size": kernel_size, **options}, layouts, production)


_RESNET = {"stride": 2, "padding": 1}

CASES = (
    _case("digits", "2 x 2 windows side by side: nothing reaches past the image", (2, 3, 12, 12), 2),
    _case("overlapping", "ResNet's 3 x 3 at stride 2: a pixel is in up to four windows", (2, 3, 15, 14), 3, **_RESNET),
    _case("dense", "stride 1: a pixel is in nine windows", (1, 2, 9, 10), 3, stride=1, padding=1),
    _case("gaps", "stride past the kernel: pixels between windows get no gradient", (2, 2, 13, 11), 2, stride=(3, 4)),
    _case("dilated", "holes inside windows, of another size each way", (2, 2, 13, 14), 3, stride=1, dilation=(2, 3)),
    _case("dilated_stride", "stride and dilation share a factor: whole lines are in no window", (2, 2, 17, 16), 3,
          stride=(4, 2), dilation=2),
    _case("coprime", "stride 3 and dilation 2: the windows of a line come from a modular inverse", (2, 2, 19, 17), 4,
          stride=(3, 2), padding=2, dilation=(2, 3)),
    _case("ceil", "a last window that is partial", (2, 2, 12, 11), 3, stride=2, ceil_mode=True),
    _case("ceil_dropped", "a last window that would start in the padding is dropped", (2, 2, 7, 5), 2, stride=2,
          padding=1, ceil_mode=True),
    _case("asymmetric", "kernel, stride and padding differ between the axes", (2, 2, 11, 14), (2, 5), stride=(1, 3),
          padding=(1, 2)),
    _case("whole_image", "one window: global pooling, its loops not unrolled", (2, 3, 7, 9), (7, 9)),
    _case("large_window", "more windows on a pixel than are unrolled", (1, 2, 8, 22), (5, 20), stride=1),
    _case("wide_positions", "windows of more than 256 elements: positions of two bytes", (1, 1, 18, 19), (17, 18),
          stride=1),
    _case("one", "every size 1", (1, 1, 1, 1), 1),
    _case("many_planes", "a tile of several planes, their number no multiple of it", (5, 27, 4, 4), 2),
    _case("odd", "a line of several tiles, the last one partial", (1, 1, 3, 601), (1, 2), stride=1),
    _case("lines", "lines whose neighbours move together: 8 outputs at a time, or 4", (2, 3, 9, 32), 3, **_RESNET),
    _case("lines_dense", "the same at stride 1: a window reaches into both neighbours of its strip", (1, 3, 8, 16), 3,
          stride=1, padding=1),
    _case("unbatched", "three axes", (3, 10, 9), 3, stride=2, padding=1),
    _case("empty_batch", "no images", (0, 3, 8, 8), 2),
    _case("channels_last", "16-byte accesses along the channels", (2, 32, 9, 10), 3, **_RESNET, layout="channels_last"),
    _case("channels_last_odd", "channels that no tile divides", (2, 19, 7, 8), 2, layout="channels_last"),
    _case("channels_last_many", "channels of several tiles, the last one partial", (1, 280, 4, 3), 2, stride=1,
          layout="channels_last"),
    _case("transposed", "columns adjacent in memory", (2, 3, 8, 9), 3, **_RESNET, layout="transposed"),
    _case("strided", "every second element", (2, 3, 8, 9), 3, **_RESNET, layout="strided"),
    _case("expanded", "one image repeated by stride 0", (3, 2, 8, 9), 3, **_RESNET, layout="expanded"),
    _case("offset", "a start off a 16-byte boundary", (2, 2, 8, 16), 2, layout="offset"),
    _case("stem", "ResNet-50's pool behind its first convolution, batch 64", (64, 64, 112, 112), 3, **_RESNET,
          layout="channels_last", production=True),
    _case("stem_contiguous", "the same in NCHW", (64, 64, 112, 112), 3, **_RESNET, production=True),
    _case("vgg", "VGG-16's first pool, 2 x 2, batch 32", (32, 64, 224, 224), 2, layout="channels_last",
          production=True),
    _case("mnist", "a digit CNN's first pool, batch 256", (256, 16, 28, 28), 2, production=True),
    _case("inception", "3 x 3 at stride 1 in an Inception block, batch 64", (64, 192, 28, 28), 3,
          stride=1, padding=1, layout="channels_last", production=True),
)  # fmt: skip

REFERENCE = Reference(
    "max_pool2d",
    max_pool2d,
    max_pool2d_grad,
    max_pool2d_magnitude,
    flops,
    bytes_moved,
    CASES,
    descriptors=False,  # windows overlap and start anywhere: there is one way to load them
)
