"""What linear_log_prob and linear_cross_entropy share: checks, and which of their paths a call takes."""

__all__ = [
    "PLAIN_BYTES",
    "check",
    "check_ignore_index",
    "check_target",
    "plain_is_best",
    "wide_logits",
]

import torch
import torch.nn.functional as torch_F
from torch import Tensor

from primer_fast import library
from primer_fast.backend import jit_traces, runs_triton, transformed

PLAIN_BYTES = 2**24  # of all logits: below, PyTorch's own operators are as small and faster


def plain_is_best(input: Tensor, linear_weight: Tensor, target: Tensor) -> bool:
    """Whether PyTorch's own operators take it: there are no rows, or so few that all logits may be in memory."""
    if jit_traces():
        return True
    rows = target.numel()
    if rows == 0:
        return True
    if runs_triton(input):
        return False
    small = rows * linear_weight.shape[0] * max(input.itemsize, 4) <= PLAIN_BYTES
    return small or transformed()


def wide_logits(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:  # (..., V)
    """All logits through PyTorch's operators, in float32 or for float64 in float64, as no 16 bits and no autocast."""
    dtype = library.logits.sums_dtype(input)
    bias = linear_bias if linear_bias is None else linear_bias.to(dtype)
    with library.logits.as_they_are(input):
        return torch_F.linear(input.to(dtype), linear_weight.to(dtype), bias)


def check(op: str, input, linear_weight, target, linear_bias, probabilities: bool = False) -> None:
    """Raise TypeError or ValueError where the tensors do not fit each other.

    probabilities: the target holds one for each class, not the index of a class.
    """
    if not probabilities and _fit(input, linear_weight, target, linear_bias):
        return
    floats = {"input": input, "linear_weight": linear_weight, "linear_bias": linear_bias}
    for name, t in (*floats.items(), ("target", target)):
        if not isinstance(t, Tensor) and (t is not None or name != "linear_bias"):
            raise TypeError(f"{op}: {name} must be a tensor; got {type(t).__name__}")
    if input.dim() == 0 or linear_weight.dim() != 2 or linear_weight.shape[1] != input.shape[-1]:
        raise ValueError(
            f"{op}: linear_weight must have shape (V, D) with D the last axis of input; "
            f"got linear_weight {tuple(linear_weight.shape)} and input {tuple(input.shape)}"
        )
    if linear_weight.shape[0] == 0:
        raise ValueError(f"{op}: linear_weight must have at least one row; got {tuple(linear_weight.shape)}")
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:1]:
        raise ValueError(
            f"{op}: linear_bias must have one element per row of linear_weight; "
            f"got linear_bias {tuple(linear_bias.shape)} and linear_weight {tuple(linear_weight.shape)}"
        )
    if probabilities and target.shape != (*input.shape[:-1], len(linear_weight)):
        raise ValueError(
            f"{op}: a target of probabilities must have one element per row of input and class; "
            f"got target {tuple(target.shape)}, input {tuple(input.shape)} and {len(linear_weight)} classes"
        )
    if not probabilities and target.dtype is not torch.int64:
        raise TypeError(f"{op}: target must hold class indices, int64; got {target.dtype}")
    if not probabilities and target.shape != input.shape[:-1]:
        raise ValueError(
            f"{op}: target must have one element per row of input; "
            f"got target {tuple(target.shape)} and input {tuple(input.shape)}"
        )
    if not input.is_floating_point():
        raise TypeError(f"{op}: input must hold floating-point numbers; got {input.dtype}")
    for name, t in (*floats.items(), ("target", target)):
        if t is None:
            continue
        if t.device != input.device:
            raise ValueError(f"{op}: all tensors must be on one device; got input {input.device}, {name} {t.device}")
        if name in floats and t.dtype != input.dtype:
            raise TypeError(f"{op}: all tensors must have one dtype; got input {input.dtype} and {name} {t.dtype}")


def check_ignore_index(op: str, ignore_index) -> None:
    """Raise TypeError where it is neither an integer nor None."""
    if type(ignore_index) is int or ignore_index is None:
        return
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise TypeError(f"{op}: ignore_index must be an integer or None; got {ignore_index!r}")


def check_target(op: str, target: Tensor, classes: int, ignore_index: int) -> None:
    """Raise IndexError where a target is neither a class nor ignored; waits for the device to say so."""
    outside = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if outside.any():
        got = int(target[outside].flatten()[0])
        raise IndexError(f"{op}: target must be in [0, {classes}) or ignore_index {ignore_index}; got {got}")


def _fit(input, linear_weight, target, linear_bias) -> bool:
    """All of ``check`` at once: on a small tensor its loops would take longer than the op."""
    if not (isinstance(input, Tensor) and isinstance(linear_weight, Tensor) and isinstance(target, Tensor)):
        return False
    shape, of_weight, dtype, device = input.shape, linear_weight.shape, input.dtype, input.device
    return (
        len(shape) > 0
        and len(of_weight) == 2
        and of_weight[0] > 0
        and of_weight[1] == shape[-1]
        and target.shape == shape[:-1]
        and dtype.is_floating_point
        and linear_weight.dtype is dtype
        and target.dtype is torch.int64
        and linear_weight.device == device
        and target.device == device
        and (
            linear_bias is None
            or (
                isinstance(linear_bias, Tensor)
                and linear_bias.shape == of_weight[:1]
                and linear_bias.dtype is dtype
                and linear_bias.device == device
            )
        )
    )
