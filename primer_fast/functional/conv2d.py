"""Differentiable 2-D convolution with bias and activation: checks and padding here, math in kernels/conv2d.py."""

__all__ = ["Pair", "conv2d", "conv2d_plain"]

import functools

import torch
import torch.nn.functional as torch_F
from torch import Tensor

from primer_fast import library
from primer_fast.backend import (
    EAGER,
    apply_of,
    autocast_dtype,
    autocast_to,
    differentiates,
    gradients_of,
    jit_traces,
    needs_operator,
    prepares,
    runs_triton,
    sharded,
    wants_gradient,
)
from primer_fast.functional.activation import apply_plain, check_activation
from primer_fast.kernels.conv2d import Geometry

Pair = int | tuple[int, int]
_NUMBERS = 1 << 63  # the first that torch's operators do not take


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, x, w, b, geometry, activation, options):  # x (N, C, H, W), w (O, C / groups, R, S)
        y, saved = run(x, w, b)
        ctx.save_for_backward(x, w, b, saved)
        ctx.geometry, ctx.activation, ctx.options = geometry, activation, options
        return y

    @staticmethod
    def backward(ctx, dy):  # dy as y
        x, w, b, saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:4]
        if differentiates(dy):
            return None, *_differentiable_grads(x, w, b, ctx, dy, needed), None, None, None
        grads = library.conv2d.gradients(dy, saved, x, w, ctx.geometry, ctx.activation, needed)
        return None, *grads, None, None, None


_apply = apply_of(_Conv2d)


def _differentiable_grads(x, w, b, ctx, dy, needed):
    plain = lambda: conv2d_plain(x, w, b, *ctx.options, activation=ctx.activation)  # noqa: E731
    return gradients_of(plain, (x, w, b), needed, dy)


def conv2d(
    input: Tensor,  # (N, C, H, W) or (C, H, W)
    weight: Tensor,  # (O, C / groups, R, S)
    bias: Tensor | None = None,  # (O,)
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
) -> Tensor:  # (N, O, P, Q) or (O, P, Q)
    """``activation(torch.nn.functional.conv2d(...))`` in one kernel; the backward fuses derivative and bias gradient.

    float32, float16 and bfloat16 on a GPU run in Triton, on input in any layout, without a copy of it; the output is
    channels_last where input or weight is, and each gradient is laid out as its tensor. float32 products follow
    ``torch.get_float32_matmul_precision()``. Other devices and dtypes, empty tensors, and gradients that are themselves
    differentiated take PyTorch's operators. Sums are in float32; two runs are bitwise equal.

    Args:
        padding: zeros before and after rows and columns, "valid" for none, or "same" for an output of the input's size
            (stride 1; where the number of zeros is odd, one more comes after).
        activation: None or one of ``primer_fast.functional.activation.ACTIVATIONS``.

    Raises:
        ValueError: the shapes or devices do not match, the kernel is larger than the padded input, a number is out of
            range, or ``activation`` is unknown.
        TypeError: an argument is of another type, or the dtypes differ.

    Source: the layer of learned kernels that a convolutional network slides over its image.
    """
    options = stride, padding, dilation, groups
    if prepares(input):
        if (dtype := autocast_dtype(input)) is not None:
            input, weight, bias = autocast_to(dtype, input, weight, bias)
        keep, geometry = wants_gradient(input, weight, bias), _known_geometry(input, weight, options)
        precision = torch.get_float32_matmul_precision()
        plan = library.conv2d.known(input, weight, bias, geometry, activation, keep, precision)
        if plan is not None:
            if keep:
                return _apply(plan, input, weight, bias, geometry, activation, options)
            return plan(input, weight, bias)[0]
    check_activation("conv2d", activation)
    if isinstance(input, Tensor) and not runs_triton(input) and (type(input) in EAGER or not sharded(input)):
        try:
            return conv2d_plain(input, weight, bias, *options, activation=activation)
        except (RuntimeError, TypeError, ValueError):  # checked only now: a small image costs less than the checks
            input, weight, bias = _prepare(input, weight, bias)
            _check(input, weight, bias, *options)
            raise
    input, weight, bias = _prepare(input, weight, bias)
    geometry = _check(input, weight, bias, *options)
    if input.numel() == 0 or weight.numel() == 0 or not _fits_32_bits(input, geometry):
        return conv2d_plain(input, weight, bias, *options, activation=activation)

    x = input[None] if input.dim() == 3 else input
    keep = wants_gradient(x, weight, bias)
    if sharded(x):
        from primer_fast.functional import shards

        y = shards.conv2d(conv2d, x, weight, bias, geometry.size, *options, activation)
    elif needs_operator(x, weight, bias):
        channels_last = library.conv2d.channels_last(x, weight)
        y = library.conv2d.conv2d(x, weight, bias, *geometry, activation, channels_last, keep)[0]
    elif keep:
        run = lambda x, w, b: library.conv2d.forward(x, w, b, geometry, activation, True)  # noqa: E731
        y = _apply(run, x, weight, bias, geometry, activation, options)
    else:
        y = library.conv2d.forward(x, weight, bias, geometry, activation, False)[0]
    return y[0] if input.dim() == 3 else y


def conv2d_plain(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
) -> Tensor:
    """The same through torch's own operators."""
    if dilation not in (1, (1, 1)) and 1 in weight.shape[2:]:  # of one tap it means nothing; in float16 oneDNN crashes
        (height, width), (R, S) = _pair("dilation", dilation, 1), weight.shape[2:]
        dilation = 1 if R == 1 else height, 1 if S == 1 else width
    return apply_plain(torch_F.conv2d(input, weight, bias, stride, padding, dilation, groups), activation)


def _prepare(input, weight, bias):
    """-> the three in autocast's dtype, once they are known to be tensors."""
    for name, t in (("input", input), ("weight", weight), ("bias", bias)):
        if not isinstance(t, Tensor) and (t is not None or name != "bias"):
            raise TypeError(f"conv2d: {name} must be a tensor; got {type(t).__name__}")
    dtype = autocast_dtype(input)
    return (input, weight, bias) if dtype is None else autocast_to(dtype, input, weight, bias)


def _pair(name, value, least):
    """An int, or a sequence of one or two, as torch takes them -> a pair of ints of at least ``least``."""
    if (
        type(value) is int and least <= value < _NUMBERS
    ):  # most calls: on a small image the rest would take longer than the op
        return value, value
    pair = (value,) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(pair, tuple | list) or any(not isinstance(n, int) or isinstance(n, bool) for n in pair):
        raise TypeError(f"conv2d: {name} must be an int or a pair of ints; got {value!r}")
    if len(pair) not in (1, 2) or min(pair) < least:
        raise ValueError(f"conv2d: {name} must be one or two numbers of at least {least}; got {value!r}")
    if max(pair) >= _NUMBERS:
        raise ValueError(f"conv2d: {name} must be one or two numbers of at least {least}, in 64 bits; got {value!r}")
    return tuple(pair) * (3 - len(pair))


def _check(input, weight, bias, stride, padding, dilation, groups) -> Geometry:
    if input.dim() not in (3, 4) or weight.dim() != 4:
        raise ValueError(
            "conv2d: input must have shape (N, C, H, W) or (C, H, W) and weight (O, C / groups, R, S); "
            f"got input {tuple(input.shape)} and weight {tuple(weight.shape)}"
        )
    if not isinstance(groups, int) or isinstance(groups, bool):
        raise TypeError(f"conv2d: groups must be an int; got {groups!r}")
    channels, out_channels = input.shape[-3], weight.shape[0]
    if groups < 1 or out_channels % groups or out_channels < groups or weight.shape[1] * groups != channels:
        raise ValueError(
            "conv2d: groups must divide the output channels, and weight have 1 / groups of the input's channels; "
            f"got groups {groups}, input {tuple(input.shape)} and weight {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            "conv2d: bias must have one element per output channel; "
            f"got bias {tuple(bias.shape)} and weight {tuple(weight.shape)}"
        )
    for name, t in (("weight", weight),) if bias is None else (("weight", weight), ("bias", bias)):
        if t.device != input.device:
            raise ValueError(f"conv2d: all tensors must be on one device; got input {input.device}, {name} {t.device}")
        if t.dtype != input.dtype:
            raise TypeError(f"conv2d: all tensors must have one dtype; got input {input.dtype} and {name} {t.dtype}")
    return _geometry(input.shape[-2:], weight.shape[-2:], stride, padding, dilation, groups)


def _known_geometry(input, weight, options) -> Geometry | None:
    """The geometry of a call that may have been checked before; None where it cannot have been."""
    try:
        return _cached_geometry(input.shape[2:], weight.shape[2:], *options)
    except (AttributeError, TypeError, ValueError):
        return None


def _geometry(image, taps, stride, padding, dilation, groups) -> Geometry:
    stride, dilation = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
    (R, S), (H, W) = taps, image
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f'conv2d: padding must be "same", "valid", an int or a pair of ints; got {padding!r}')
        if padding == "same" and stride != (1, 1):
            raise ValueError(f'conv2d: padding="same" must come with stride 1; got stride {stride}')
        zeros = (dilation[0] * (R - 1), dilation[1] * (S - 1)) if padding == "same" else (0, 0)
        before = zeros[0] // 2, zeros[1] // 2
    else:
        before = _pair("padding", padding, 0)
        zeros = 2 * before[0], 2 * before[1]
    height, width = H + zeros[0], W + zeros[1]  # of the padded input
    reach = dilation[0] * (R - 1) + 1, dilation[1] * (S - 1) + 1
    if height < reach[0] or width < reach[1] or R < 1 or S < 1:
        raise ValueError(
            "conv2d: the dilated kernel must fit into the padded input; "
            f"got kernel {reach[0]} x {reach[1]} and input {height} x {width}"
        )
    size = (height - reach[0]) // stride[0] + 1, (width - reach[1]) // stride[1] + 1
    # A stride means nothing where there is one output, nor a dilation where there is one tap. As 1 it cannot overflow.
    stride = 1 if size[0] == 1 else stride[0], 1 if size[1] == 1 else stride[1]
    dilation = 1 if R == 1 else dilation[0], 1 if S == 1 else dilation[1]
    return Geometry(stride, before, dilation, groups, size)


def _fits_32_bits(input, geometry) -> bool:
    """Whether the kernels, whose positions have 32 bits, can address the padded input."""
    return all(n + 2 * zeros < 2**31 for n, zeros in zip(input.shape[-2:], geometry.padding, strict=True))


@functools.lru_cache(maxsize=1024, typed=True)
def _cached_geometry(*sizes_and_options):
    if jit_traces():
        raise TypeError("sizes are tensors while torch.jit.trace looks on")
    return _geometry(*sizes_and_options)
