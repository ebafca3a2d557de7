"""Differentiable 2-D convolution with bias and activation: checks and padding here, math in kernels/conv2d.py."""

__all__ = ["Pair", "conv2d", "conv2d_plain"]

import functools

import torch
import torch.nn.functional as torch_F
from torch import Tensor

from primer_fast.backend import autocast, jit_traces, prepares, runs_triton, sharded, wants_gradient
from primer_fast.functional.activation import apply_plain, check_activation
from primer_fast.functional.checks import check_alike, check_tensors, pair
from primer_fast.functional.operator import differentiable, differentiates, gradients_of, operator
from primer_fast.kernels.activation import FROM_OUTPUT, keeps_derivative
from primer_fast.kernels.conv2d import Geometry, conv2d_bwd, conv2d_fwd
from primer_fast.kernels.launch.prepared import prepared
from primer_fast.kernels.max_pool2d import is_channels_last

Pair = int | tuple[int, int]
_NUMBERS = 1 << 63  # the first that torch's operators do not take


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
        input, weight, bias = autocast(input, weight, bias)
        keep, geometry = wants_gradient(input, weight, bias), _known_geometry(input, weight, options)
        precision = torch.get_float32_matmul_precision()
        plan = _launch.known(input, weight, bias, geometry, activation, keep, precision)
        if plan is not None and geometry is not None:
            if keep:
                return _apply(input, weight, bias, (*geometry, activation, None, keep), plan)
            return plan(input, weight, bias)[0]
    check_activation("conv2d", activation)
    if isinstance(input, Tensor) and not runs_triton(input) and not sharded(input):
        try:
            return conv2d_plain(input, weight, bias, *options, activation=activation)
        except (RuntimeError, TypeError, ValueError):  # checked only now: a small image costs less than the checks
            input, weight, bias = autocast(input, weight, bias)
            _check(input, weight, bias, *options)
            raise
    input, weight, bias = autocast(input, weight, bias)
    geometry = _check(input, weight, bias, *options)
    if input.numel() == 0 or weight.numel() == 0 or not _fits_32_bits(input, geometry):
        return conv2d_plain(input, weight, bias, *options, activation=activation)

    x = input[None] if input.dim() == 3 else input
    if sharded(x):
        from primer_fast.functional import shards

        y = shards.conv2d(conv2d, x, weight, bias, geometry.size, *options, activation)
    else:
        keep = wants_gradient(x, weight, bias)
        y = _call(keep, x, weight, bias, *geometry, activation, _gives_channels_last(x, weight), keep)
    return y[0] if input.dim() == 3 else y


def _gives_channels_last(x, w) -> bool:
    return is_channels_last(x) or is_channels_last(w)


@prepared(3)
def _launch(x, w, b, geometry, activation, keep, precision):
    b = b if b is None else b.contiguous()
    return conv2d_fwd(x, w, b, geometry, activation, keep, precision, _gives_channels_last(x, w))


_launch_backward = prepared(4)(conv2d_bwd)


def _geometry_of(stride, padding, dilation, groups, size) -> Geometry:
    """The geometry whose numbers an operator gets as lists."""
    return Geometry(tuple(stride), tuple(padding), tuple(dilation), groups, tuple(size))


@operator("conv2d")
def _forward(
    input: Tensor, weight: Tensor, bias: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], groups: int, size: list[int],
    activation: str | None, channels_last: bool, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> y, and what the backward needs beside input and weight. channels_last: how y is laid out."""
    geometry = _geometry_of(stride, padding, dilation, groups, size)
    return _launch(input, weight, bias, geometry, activation, keep, torch.get_float32_matmul_precision())


@_forward.register_fake
def _(input, weight, bias, stride, padding, dilation, groups, size, activation, channels_last, keep):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    y = torch.empty(
        (input.shape[0], weight.shape[0], *size), dtype=input.dtype, device=input.device, memory_format=layout
    )
    return y, torch.empty_like(y) if keep and keeps_derivative(activation) else None


@operator("conv2d_backward")
def _gradients(
    dy: Tensor, saved: Tensor | None, input: Tensor, weight: Tensor,
    stride: list[int], padding: list[int], dilation: list[int], groups: int, size: list[int],
    activation: str | None, needed: list[bool],
) -> list[Tensor]:  # fmt: skip
    geometry, precision = _geometry_of(stride, padding, dilation, groups, size), torch.get_float32_matmul_precision()
    return _launch_backward(dy, saved, input, weight, geometry, activation, tuple(needed), precision)


@_gradients.register_fake
def _(dy, saved, input, weight, stride, padding, dilation, groups, size, activation, needed):
    return torch.empty_like(input), torch.empty_like(weight), weight.new_empty(weight.shape[:1])


def _setup(ctx, inputs, output):
    x, w, b = inputs[:3]
    ctx.geometry, activation = inputs[3:8], inputs[8]
    y, saved = output
    ctx.save_for_backward(x, w, b, None if activation is None else y if activation in FROM_OUTPUT else saved)
    ctx.activation = activation


def _backward(ctx, dy):
    x, w, b, saved = ctx.saved_tensors
    needed = ctx.needs_input_grad[:3]
    if differentiates(dy):
        plain = lambda: _plain_of(_geometry_of(*ctx.geometry), x, w, b, ctx.activation)  # noqa: E731
        return gradients_of(plain, (x, w, b), needed, dy)
    return _gradients(dy, saved, x, w, *ctx.geometry, ctx.activation, needed)


def _plain_of(geometry, x, w, b, activation):
    """``conv2d_plain`` where padding="same" may have put more zeros after the image than before it."""
    stride, before, dilation, groups, size = geometry
    image, reach = x.shape[2:], [d * (taps - 1) + 1 for d, taps in zip(dilation, w.shape[2:], strict=True)]
    if size == tuple((image[i] + 2 * before[i] - reach[i]) // stride[i] + 1 for i in range(2)):
        return conv2d_plain(x, w, b, stride, before, dilation, groups, activation=activation)
    after = [(size[i] - 1) * stride[i] + reach[i] - image[i] - before[i] for i in range(2)]
    x = torch_F.pad(x, (before[1], after[1], before[0], after[0]))
    return conv2d_plain(x, w, b, stride, 0, dilation, groups, activation=activation)


_call, _apply = differentiable(_forward, _setup, _backward, leading=3)


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


def _pair(name, value, least):
    """The option as a pair of numbers, each at least ``least`` and small enough for torch's operators."""
    numbers = pair("conv2d", name, value)
    if min(numbers) < least:
        raise ValueError(f"conv2d: {name} must be one or two numbers of at least {least}; got {value!r}")
    if max(numbers) >= _NUMBERS:
        raise ValueError(f"conv2d: {name} must be one or two numbers of at least {least}, in 64 bits; got {value!r}")
    return numbers


def _check(input, weight, bias, stride, padding, dilation, groups) -> Geometry:
    tensors = {"input": input, "weight": weight, "bias": bias}
    check_tensors("conv2d", tensors, optional=("bias",))
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
    check_alike("conv2d", tensors)
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
