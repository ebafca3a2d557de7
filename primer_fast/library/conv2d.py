"""The operators primer_fast::conv2d and conv2d_backward."""

import torch
from torch import Tensor

from primer_fast.kernels.activation import FROM_OUTPUT
from primer_fast.kernels.conv2d import Geometry, conv2d_bwd, conv2d_fwd
from primer_fast.kernels.prepared import prepared
from primer_fast.library.register import absent, check_kept, only, operator, present, spread


def forward(x, w, b, geometry, activation, keep):
    """x (N, C, H, W), w (O, C / groups, R, S), b (O,) or None -> y (N, O, P, Q), what the backward needs or None."""
    return _forward(x, w, b, geometry, activation, keep, torch.get_float32_matmul_precision())


def gradients(dy, saved, x, w, geometry, activation, needed):
    """dy (N, O, P, Q) -> dx, dw, db, None for each that is not needed."""
    return _gradients(dy, saved, x, w, geometry, activation, tuple(needed), torch.get_float32_matmul_precision())


@prepared(3)
def _forward(x, w, b, geometry, activation, keep, precision):
    b = b if b is None else b.contiguous()
    return conv2d_fwd(x, w, b, geometry, activation, keep, precision, channels_last(x, w))


_gradients = prepared(4)(conv2d_bwd)
known = _forward.known


def channels_last(x: Tensor, w: Tensor) -> bool:
    """Whether the result is channels_last: where input or weight is."""
    return _is_channels_last(x) or _is_channels_last(w)


def _is_channels_last(t: Tensor) -> bool:
    """Whether torch takes the layout for channels_last; one that is also contiguous is not."""
    before = 0
    if t.stride(1) == 0:
        return False
    for axis in (1, 3, 2, 0):
        size, stride = t.shape[axis], t.stride(axis)
        if size == 0 or stride < before or (axis == 0 and before == t.stride(1)):
            return False
        before = stride * max(size, 1)
    return True


def _geometry(stride, padding, dilation, groups, size):
    return Geometry(tuple(stride), tuple(padding), tuple(dilation), groups, tuple(size))


@operator("conv2d")
def conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], groups: int, size: list[int],
    activation: str | None, channels_last: bool, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    geometry = _geometry(stride, padding, dilation, groups, size)
    y, saved = forward(input, weight, bias, geometry, activation, keep)
    return y, present(saved, y)


@conv2d.register_fake
def _(input, weight, bias, stride, padding, dilation, groups, size, activation, channels_last, keep):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    y = torch.empty(
        (input.shape[0], weight.shape[0], *size), dtype=input.dtype, device=input.device, memory_format=layout
    )
    derivative = keep and activation is not None and activation not in FROM_OUTPUT
    return y, torch.empty_like(y) if derivative else absent(y)


@operator("conv2d_backward")
def conv2d_backward(
    dy: Tensor, saved: Tensor | None, input: Tensor, weight: Tensor,
    stride: list[int], padding: list[int], dilation: list[int], groups: int, size: list[int],
    activation: str | None, needed: list[bool],
) -> list[Tensor]:  # fmt: skip
    geometry = _geometry(stride, padding, dilation, groups, size)
    return only(gradients(dy, saved, input, weight, geometry, activation, needed), needed)


@conv2d_backward.register_fake
def _(dy, saved, input, weight, stride, padding, dilation, groups, size, activation, needed):
    return only((torch.empty_like(input), torch.empty_like(weight), weight.new_empty(weight.shape[:1])), needed)


def _setup(ctx, inputs, output):
    x, w, _, *geometry, activation, _, keep = inputs
    y, saved = output
    check_kept("conv2d", keep)
    ctx.mark_non_differentiable(saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, w, None if activation is None else y if activation in FROM_OUTPUT else saved)
    ctx.geometry, ctx.activation = geometry, activation


def _backward(ctx, dy, _):
    x, w, saved = ctx.saved_tensors
    needed = ctx.needs_input_grad[:3]
    grads = conv2d_backward(dy, saved, x, w, *ctx.geometry, ctx.activation, needed)
    return *spread(grads, needed), *(None,) * 8


conv2d.register_autograd(_backward, setup_context=_setup)
