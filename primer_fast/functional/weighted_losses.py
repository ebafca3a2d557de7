"""Cross entropy with weights of classes, or with probabilities as target: through PyTorch's operators, in chunks.

    loss_i = -sum_v w_v ((1 - s) q_iv + s / V) log p_iv        q: the target's probabilities, or 1 at its class
    mean = sum_i loss_i / sum_i w_{t_i} over the class indices that count, or sum_i loss_i / N of probabilities

Source: torch.nn.functional.cross_entropy. Legend: N rows (all leading axes of input together), D features, V classes.
"""

__all__ = ["CHUNK_BYTES", "check_weighted", "weighted_losses", "weighted_reduction", "weights_of"]

import functools

import torch
import torch.nn.functional as torch_F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from primer_fast.backend import jit_traces, runs_triton, transformed
from primer_fast.functional.checks import check_alike
from primer_fast.functional.logits import PLAIN_BYTES, as_they_are, check_target, sums_dtype
from primer_fast.functional.operator import as_rows

CHUNK_BYTES = 2**26  # of float32 logits at a time


def check_weighted(linear_weight: Tensor, target: Tensor, weight, ignore_index: int) -> None:
    """Raise TypeError or ValueError where the weights or the ignored index do not fit."""
    op = "linear_cross_entropy"
    if target.is_floating_point() and ignore_index != -100:
        raise ValueError(f"{op}: ignore_index is of class indices, and probabilities have none; got {ignore_index}")
    if weight is None:
        return
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"{op}: weight must be a tensor of floating-point numbers or None; got {got}")
    if weight.shape != linear_weight.shape[:1]:
        raise ValueError(
            f"{op}: weight must have one element per row of linear_weight; "
            f"got weight {tuple(weight.shape)} and linear_weight {tuple(linear_weight.shape)}"
        )
    check_alike(op, {"linear_weight": linear_weight, "weight": weight}, dtypes=False)
    if weight.requires_grad:
        raise ValueError(f"{op}: weight must not require a gradient, which torch does not have either")


def weights_of(target: Tensor, weight: Tensor, ignore_index: int) -> Tensor:
    """Class indices (...) -> their weights (...), 0 for ignored ones."""
    known = target.clamp(0, len(weight) - 1)
    return weight.index_select(0, known.flatten()).view(target.shape).masked_fill(target == ignore_index, 0)


def weighted_losses(
    input: Tensor,  # (..., D)
    linear_weight: Tensor,  # (V, D)
    linear_bias: Tensor | None,  # (V,)
    target: Tensor,  # (...) int64 or (..., V)
    weight: Tensor | None,  # (V,)
    ignore_index: int,
    smoothing: float,
) -> Tensor:  # (...) in float32, or float64
    """The loss of each row; 0 for ignored ones."""
    probabilities = target.is_floating_point()
    lead, dtype = input.shape[:-1], sums_dtype(input)
    x, classes = as_rows(input), len(linear_weight)
    targets = target.reshape(len(x), classes) if probabilities else target.reshape(-1)
    traced = torch.compiler.is_compiling() or jit_traces() or transformed()
    looks = target.is_cpu and not runs_triton(input) and not traced
    if looks and not probabilities:
        check_target("linear_cross_entropy", target, classes, ignore_index)
    w = linear_weight.to(dtype)
    b, weight = (None if t is None else t.to(dtype) for t in (linear_bias, weight))

    def losses(x_rows, targets):
        with as_they_are(input):
            logits = torch_F.linear(x_rows.to(dtype), w, b)
            of = functools.partial(
                torch_F.cross_entropy, logits, weight=weight, reduction="none", label_smoothing=smoothing
            )
            if probabilities:
                return of(targets.to(dtype))
            known = (targets >= 0) & (targets < classes) | (targets == ignore_index)
            found = of(targets.where(known, 0), ignore_index=ignore_index)
            return found * torch.where(known, 1.0, torch.nan).to(dtype)

    row = classes * dtype.itemsize
    if jit_traces() or transformed() or len(x) * row <= PLAIN_BYTES:
        return losses(x, targets).view(lead)
    step = max(CHUNK_BYTES // row, 1)
    parts = [
        checkpoint(losses, x[i : i + step], targets[i : i + step], use_reentrant=False, preserve_rng_state=False)
        for i in range(0, len(x), step)
    ]
    return torch.cat(parts).view(lead)


def weighted_reduction(losses: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int):
    """Losses of the rows -> these, their sum, or their mean."""
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if target.is_floating_point() or weight is None:
        return losses.sum() / losses.numel()
    return losses.sum() / weights_of(target, weight, ignore_index).to(losses.dtype).sum()
