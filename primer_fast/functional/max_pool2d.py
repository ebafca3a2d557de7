"""Differentiable max-pooling: checks here, math in kernels/max_pool2d.py."""

__all__ = ["Size", "max_pool2d", "max_pool2d_plain"]

import functools
import math
from typing import Any, Literal, overload

import torch
import torch.nn.functional as torch_F
from torch import Tensor
from torch.autograd import forward_ad

from primer_fast.backend import jit_traces, prepares, runs_triton, sharded, sums_narrowly, tangents, wants_gradient
from primer_fast.functional.checks import check_tensors, pair
from primer_fast.functional.operator import differentiable, differentiates, operator
from primer_fast.kernels.launch.prepared import prepared
from primer_fast.kernels.max_pool2d import is_channels_last, max_pool2d_bwd, max_pool2d_fwd, output_size, position_dtype

Size = int | tuple[int, int]


@overload
def max_pool2d(
    input: Tensor, kernel_size: Size, stride: Size | None = None, padding: Size = 0, dilation: Size = 1,
    ceil_mode: bool = False, return_indices: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def max_pool2d(
    input: Tensor, kernel_size: Size, stride: Size | None = None, padding: Size = 0, dilation: Size = 1,
    ceil_mode: bool = False, *, return_indices: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def max_pool2d(
    input: Tensor, kernel_size: Size, stride: Size | None = None, padding: Size = 0, dilation: Size = 1,
    ceil_mode: bool = False, return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def max_pool2d(
    input: Tensor,  # (N, C, H, W) or (C, H, W)
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # (N, C, OH, OW) or (C, OH, OW)
    """Largest element of each window, in one pass; the backward gathers, without atomics or int64 indices.

    float32, float16 and bfloat16 on a GPU run in Triton, with any strides, in the input's memory format; other devices
    and dtypes take PyTorch's operator. Values, indices and which element wins (the last NaN, else the first of equals)
    are PyTorch's, bit for bit. A gradient is summed in float32; two runs are bitwise equal. Until the backward one byte
    per output is kept, and the input is not.

    Args:
        kernel_size, stride, padding, dilation: of both axes, or (of lines, of columns); stride None: the kernel's.
        ceil_mode: a last window that does not fit is taken too, if it starts in the image.
        return_indices: return also the index h * W + w of each winner, int64.

    Raises:
        ValueError: the input is not (N, C, H, W) or (C, H, W), only N may be 0; kernel, stride or dilation below 1;
            padding negative or over half the kernel; no window fits.
        TypeError: an argument has the wrong type, or elements of ``input`` have no order.

    Source: torch.nn.functional.max_pool2d.
    """
    if prepares(input):
        keep, cut = wants_gradient(input), _known_window(input, kernel_size, stride, padding, dilation, ceil_mode)
        if cut is not None:
            window, size = cut
            plan = _launch.known(input, *window, size, keep, return_indices)
            if plan is not None and keep:
                return _apply(input, (*window, size, keep, return_indices), plan)
            if plan is not None:
                y, _, indices = plan(input)
                return (y, indices) if return_indices else y
    if isinstance(input, Tensor) and not runs_triton(input) and not sharded(input):
        try:
            return max_pool2d_plain(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
        except (RuntimeError, TypeError, ValueError):  # checked only now: a small image costs less than the checks
            (kernel, steps, zeros, spread), _ = _check(input, kernel_size, stride, padding, dilation, ceil_mode)
            if max(*pair("max_pool2d", "stride", stride or kernel), *pair("max_pool2d", "dilation", dilation)) < 2**31:
                raise
            # torch's numbers have 32 bits; ours here are the smallest that mean the same
            return max_pool2d_plain(input, kernel, steps, zeros, spread, ceil_mode, return_indices)
    window, size = _check(input, kernel_size, stride, padding, dilation, ceil_mode)
    x = input if input.dim() == 4 else input[None]
    if sharded(x):
        from primer_fast.functional import shards

        told = kernel_size, stride, padding, dilation, ceil_mode, return_indices
        results = shards.max_pool2d(lambda x: max_pool2d(x, *told), x, size, return_indices)
        results = results if return_indices else results[0]
    else:
        keep = wants_gradient(x)
        results = _call(keep, x, *window, size, keep, return_indices)
    if input.dim() == 4:
        return results
    return (results[0][0], results[1][0]) if return_indices else results[0]


_launch, _launch_backward = prepared(1)(max_pool2d_fwd), prepared(2)(max_pool2d_bwd)


def _like(t, shape, dtype, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=t.device, memory_format=layout)


@operator("max_pool2d")
def _forward(
    input: Tensor,
    kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], size: list[int],
    keep: bool, return_indices: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> y, each winner's position in its window, its index in the image"""
    window = tuple(kernel), tuple(stride), tuple(padding), tuple(dilation)
    return _launch(input, *window, tuple(size), keep, return_indices)


@_forward.register_fake
def _(input, kernel, stride, padding, dilation, size, keep, return_indices):
    shape, channels_last = (*input.shape[:2], *size), is_channels_last(input)
    y = _like(input, shape, input.dtype, channels_last)
    kept = _like(input, shape, position_dtype(math.prod(kernel)), channels_last) if keep else None
    return y, kept, _like(input, shape, torch.int64, channels_last) if return_indices else None


@operator("max_pool2d_backward")
def _gradient(
    dy: Tensor, kept: Tensor,
    kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], size: list[int],
) -> Tensor:  # fmt: skip
    window = tuple(kernel), tuple(stride), tuple(padding), tuple(dilation)
    return _launch_backward(dy, kept, *window, tuple(size))


@_gradient.register_fake
def _(dy, kept, kernel, stride, padding, dilation, size):
    return _like(dy, (*dy.shape[:2], *size), dy.dtype, is_channels_last(kept))


def _setup(ctx, inputs, output):
    ctx.save_for_backward(output[1])
    ctx.window, ctx.size = inputs[1:5], inputs[0].shape[2:]


def _backward(ctx, dy, _=None):  # dy (N, C, OH, OW); indices have no gradient
    (kept,) = ctx.saved_tensors
    if not differentiates(dy):
        return (_gradient(dy, kept, *ctx.window, ctx.size),)
    gradient = _scattered if tangents() or not torch._C._has_storage(dy) else _Gradient.apply
    return (gradient(dy, kept, ctx.window, ctx.size),)


class _Gradient(torch.autograd.Function):
    """dy -> dx. That is linear in dy: its own gradient gives each output what arrives at the pixel that won there."""

    @staticmethod
    def forward(ctx, dy, kept, window, size):
        ctx.save_for_backward(kept)
        ctx.window = window
        return _gradient(dy, kept, *window, size)

    @staticmethod
    def backward(ctx, ddx):  # ddx (N, C, H, W)
        (kept,) = ctx.saved_tensors
        indices, there = _winners(kept, ctx.window, ddx.shape[2:])
        ddy = ddx.flatten(2).gather(2, indices.flatten(2)).view(kept.shape)
        return torch.where(there, ddy, 0), None, None, None


def _scattered(dy, kept, window, size):
    """dy -> dx through torch's operators, which carry on what a transform adds."""
    indices, there = _winners(kept, window, size)
    (N, C), (H, W) = dy.shape[:2], size
    dy = torch.where(there, dy, 0).reshape(N, C, -1)
    dx = torch.zeros(N, C, H * W, dtype=dy.dtype, device=dy.device)
    return dx.scatter_add(2, indices.flatten(2), dy).view(N, C, H, W)


def _winners(kept, window, size):
    """kept (N, C, OH, OW), positions in windows -> the winners' h * W + w, int64, and whether these are in the image.

    With dilation a window may have no pixel in the image.
    """
    kernel, stride, padding, dilation = window
    kept = kept.long()
    corners = (
        torch.arange(n, device=kept.device) * s - p for n, s, p in zip(kept.shape[2:], stride, padding, strict=True)
    )
    top, left = next(corners)[:, None], next(corners)
    h, w = top + kept // kernel[1] * dilation[0], left + kept % kernel[1] * dilation[1]
    there = (h < size[0]) & (w < size[1])
    return torch.where(there, h * size[1] + w, 0), there


def _chosen(inputs, output):
    return (output[0], output[2]) if inputs[7] else output[0]  # y, and the indices where they were asked for


_call, _apply = differentiable(_forward, _setup, _backward, 1, _chosen)


def max_pool2d_plain(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The same through torch's own operator."""
    if sums_narrowly(input) and stride not in (None, kernel_size):  # windows may overlap
        result = max_pool2d_plain(input.float(), kernel_size, stride, padding, dilation, ceil_mode, return_indices)
        if isinstance(result, tuple):
            return result[0].to(input.dtype), result[1]
        return result.to(input.dtype)
    options: tuple[Any, ...] = kernel_size, [] if stride is None else stride, padding, dilation, ceil_mode
    if (input.requires_grad or tangents()) and dilation not in (1, (1, 1), [1, 1]):
        with torch.no_grad(), forward_ad._set_fwd_grad_enabled(False):
            y, indices = torch_F.max_pool2d_with_indices(input, *options)
        y = _gathered(input, indices, *_check(input, kernel_size, stride, padding, dilation, ceil_mode))
        return (y, indices) if return_indices else y
    if return_indices:
        return torch_F.max_pool2d_with_indices(input, *options)
    return torch.max_pool2d(input, *options)


def _gathered(input, indices, window, size):
    """The winners of dilated windows, differentiable: torch's gradient of a window past the image is not in the image.

    On a CPU it writes there, wherever that is in memory.
    """
    kernel, stride, padding, dilation = window
    inside = []
    for axis in range(2):
        starts = torch.arange(size[axis], device=input.device)[:, None] * stride[axis] - padding[axis]
        taps = starts + torch.arange(kernel[axis], device=input.device) * dilation[axis]
        inside.append(((taps >= 0) & (taps < input.shape[axis - 2])).any(dim=1))
    there = inside[0][:, None] & inside[1]
    values = input.flatten(-2).gather(-1, torch.where(there, indices, 0).flatten(-2)).view(indices.shape)
    return torch.where(there, values, -torch.inf)


def _check(input, kernel_size, stride, padding, dilation, ceil_mode):
    """-> (kernel, stride, padding, dilation) as pairs, (OH, OW)"""
    check_tensors("max_pool2d", {"input": input})
    if input.dim() not in (3, 4) or 0 in input.shape[-3:]:
        raise ValueError(
            "max_pool2d: input must have shape (N, C, H, W) or (C, H, W), where only N may be 0; "
            f"got {tuple(input.shape)}"
        )
    if not input.is_floating_point() and (input.is_complex() or input.dtype is torch.bool):
        raise TypeError(f"max_pool2d: input must hold real numbers; got {input.dtype}")
    return _window(input.shape[-2:], kernel_size, stride, padding, dilation, ceil_mode)


def _known_window(input, *options):
    """``_check`` of a call that may have been checked before; None where it cannot have been."""
    try:
        return _cached_window(input.shape[2:], *options)
    except (TypeError, ValueError):
        return None


def _window(image, kernel_size, stride, padding, dilation, ceil_mode):
    kernel, padding, dilation = (
        pair("max_pool2d", "kernel_size", kernel_size),
        pair("max_pool2d", "padding", padding),
        pair("max_pool2d", "dilation", dilation),
    )
    none = stride is None or (isinstance(stride, tuple | list) and len(stride) == 0)
    stride = kernel if none else pair("max_pool2d", "stride", stride)
    for name, (height, width) in (("kernel_size", kernel), ("stride", stride), ("dilation", dilation)):
        if height < 1 or width < 1:
            raise ValueError(f"max_pool2d: {name} must be at least 1; got {(height, width)}")
    if not (0 <= padding[0] <= kernel[0] // 2 and 0 <= padding[1] <= kernel[1] // 2):
        raise ValueError(
            f"max_pool2d: padding must be between 0 and half of kernel_size; got padding {padding} and "
            f"kernel_size {kernel}"
        )
    if not isinstance(ceil_mode, bool):
        raise TypeError(f"max_pool2d: ceil_mode must be a bool; got {ceil_mode!r}")
    H, W = image
    size = (
        output_size(H, kernel[0], stride[0], padding[0], dilation[0], ceil_mode),
        output_size(W, kernel[1], stride[1], padding[1], dilation[1], ceil_mode),
    )
    if size[0] < 1 or size[1] < 1:
        raise ValueError(
            f"max_pool2d: at least one window must fit in the image; got output size {size} for image {(H, W)}, "
            f"kernel_size {kernel}, padding {padding} and dilation {dilation}"
        )
    # Beyond the image, a stride leaves one window; of a single tap, a dilation means nothing: neither may overflow.
    stride = tuple(min(s, n + 2 * p) for s, n, p in zip(stride, (H, W), padding, strict=True))
    dilation = tuple(1 if k == 1 else d for k, d in zip(kernel, dilation, strict=True))
    return (kernel, stride, padding, dilation), size


@functools.lru_cache(maxsize=1024, typed=True)
def _cached_window(*sizes_and_options):
    if jit_traces():
        raise TypeError("sizes are tensors while torch.jit.trace looks on")
    return _window(*sizes_and_options)
