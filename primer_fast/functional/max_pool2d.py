"""Differentiable max-pooling: checks here, math in kernels/max_pool2d.py."""

__all__ = ["Size", "max_pool2d", "max_pool2d_plain"]

import functools
import operator
from typing import Any, Literal, overload

import torch
import torch.nn.functional as torch_F
from torch import Tensor
from torch.autograd import forward_ad

from primer_fast import library
from primer_fast.backend import (
    EAGER,
    apply_of,
    differentiates,
    jit_traces,
    needs_operator,
    prepares,
    runs_triton,
    sharded,
    sums_narrowly,
    tangents,
    wants_gradient,
)
from primer_fast.kernels.max_pool2d import output_size

Size = int | tuple[int, int]


class _MaxPool2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, x, window, return_indices):  # x (N, C, H, W)
        y, kept, indices = run(x)
        ctx.save_for_backward(kept)
        ctx.window, ctx.size = window, x.shape[2:]
        if return_indices:
            ctx.mark_non_differentiable(indices)
        return y, indices

    @staticmethod
    def backward(ctx, dy, _):  # dy (N, C, OH, OW)
        (kept,) = ctx.saved_tensors
        if differentiates(dy):
            gradient = _scattered if tangents() or not torch._C._has_storage(dy) else _Gradient.apply
            return None, gradient(dy, kept, ctx.window, ctx.size), None, None
        return None, library.max_pool2d.gradient(dy, kept, *ctx.window, ctx.size), None, None


_apply = apply_of(_MaxPool2d)


class _Gradient(torch.autograd.Function):
    """dy -> dx, which is linear: its own gradient takes to each output what arrives at the pixel that won."""

    @staticmethod
    def forward(ctx, dy, kept, window, size):
        ctx.save_for_backward(kept)
        ctx.window = window
        return library.max_pool2d.gradient(dy, kept, *window, size)

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
    """Positions in the windows (N, C, OH, OW) -> the winners' h * W + w, int64, and whether they are in the image:
    dilation may lead past it.
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
        plan = None if cut is None else library.max_pool2d.forward.known(input, *cut[0], cut[1], keep, return_indices)
        if plan is not None:
            y, indices = _apply(plan, input, cut[0], return_indices) if keep else plan(input)[::2]
            return (y, indices) if return_indices else y
    if isinstance(input, Tensor) and not runs_triton(input) and (type(input) in EAGER or not sharded(input)):
        try:
            return max_pool2d_plain(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
        except (RuntimeError, TypeError, ValueError):  # checked only now: a small image costs less than the checks
            (kernel, steps, zeros, spread), _ = _check(input, kernel_size, stride, padding, dilation, ceil_mode)
            if max(*_pair("stride", stride or kernel), *_pair("dilation", dilation)) < 2**31:
                raise
            # torch's numbers have 32 bits; ours here are the smallest that mean the same
            return max_pool2d_plain(input, kernel, steps, zeros, spread, ceil_mode, return_indices)
    window, size = _check(input, kernel_size, stride, padding, dilation, ceil_mode)
    x = input if input.dim() == 4 else input[None]
    keep = wants_gradient(x)
    if sharded(x):
        from primer_fast.functional import shards

        told = kernel_size, stride, padding, dilation, ceil_mode, return_indices
        y, indices = (*shards.max_pool2d(lambda x: max_pool2d(x, *told), x, size, return_indices), None)[:2]
    elif needs_operator(x):
        y, _, indices = library.max_pool2d.max_pool2d(x, *window, size, keep, return_indices)
    elif keep:
        run = lambda x: library.max_pool2d.forward(x, *window, size, True, return_indices)  # noqa: E731
        y, indices = _apply(run, x, window, return_indices)
    else:
        y, _, indices = library.max_pool2d.forward(x, *window, size, False, return_indices)
    if input.dim() == 3:
        y, indices = y[0], indices[0] if return_indices else None
    return (y, indices) if return_indices else y


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


def _pair(name, value):
    if type(value) is int:
        return value, value
    try:
        values = tuple(value) if isinstance(value, tuple | list) else (value,)
        if any(isinstance(v, bool) for v in values):
            raise TypeError
        values = tuple(operator.index(v) for v in values)
    except TypeError:
        raise TypeError(f"max_pool2d: {name} must be an integer or a pair of them; got {value!r}") from None
    if len(values) not in (1, 2):
        raise ValueError(f"max_pool2d: {name} must be an integer or a pair of them; got {value!r}")
    return values * 2 if len(values) == 1 else values


def _check(input, kernel_size, stride, padding, dilation, ceil_mode):
    """-> (kernel, stride, padding, dilation) as pairs, (OH, OW)"""
    if not isinstance(input, Tensor):
        raise TypeError(f"max_pool2d: input must be a tensor; got {type(input).__name__}")
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
        _pair("kernel_size", kernel_size),
        _pair("padding", padding),
        _pair("dilation", dilation),
    )
    none = stride is None or (isinstance(stride, tuple | list) and len(stride) == 0)
    stride = kernel if none else _pair("stride", stride)
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
