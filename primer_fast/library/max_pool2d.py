"""The operators primer_fast::max_pool2d and max_pool2d_backward."""

import math

import torch
from torch import Tensor

from primer_fast.kernels.max_pool2d import is_channels_last, max_pool2d_bwd, max_pool2d_fwd, position_dtype
from primer_fast.kernels.prepared import prepared
from primer_fast.library.register import absent, check_kept, operator, present


def _like(t, shape, dtype, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=t.device, memory_format=layout)


forward, gradient = prepared(1)(max_pool2d_fwd), prepared(2)(max_pool2d_bwd)


@operator("max_pool2d")
def max_pool2d(
    input: Tensor,
    kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], size: list[int],
    keep: bool, return_indices: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    window = (tuple(kernel), tuple(stride), tuple(padding), tuple(dilation))
    y, kept, indices = forward(input, *window, tuple(size), keep, return_indices)
    return y, present(kept, y), present(indices, y)


@max_pool2d.register_fake
def _(input, kernel, stride, padding, dilation, size, keep, return_indices):
    shape, channels_last = (*input.shape[:2], *size), is_channels_last(input)
    y = _like(input, shape, input.dtype, channels_last)
    kept = _like(input, shape, position_dtype(math.prod(kernel)), channels_last) if keep else absent(y)
    return y, kept, _like(input, shape, torch.int64, channels_last) if return_indices else absent(y)


@operator("max_pool2d_backward")
def max_pool2d_backward(
    dy: Tensor, kept: Tensor,
    kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], size: list[int],
) -> Tensor:  # fmt: skip
    window = (tuple(kernel), tuple(stride), tuple(padding), tuple(dilation))
    return gradient(dy, kept, *window, tuple(size))


@max_pool2d_backward.register_fake
def _(dy, kept, kernel, stride, padding, dilation, size):
    return _like(dy, (*dy.shape[:2], *size), dy.dtype, is_channels_last(kept))


def _setup(ctx, inputs, output):
    x, *window, _, keep, _ = inputs
    _, kept, indices = output
    check_kept("max_pool2d", keep)
    ctx.mark_non_differentiable(kept, indices)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(kept)
    ctx.window, ctx.size = window, x.shape[2:]


def _backward(ctx, dy, *_):
    return max_pool2d_backward(dy, *ctx.saved_tensors, *ctx.window, ctx.size), *(None,) * 7


max_pool2d.register_autograd(_backward, setup_context=_setup)
