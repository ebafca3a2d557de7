"""Losses of rows -> their sum or mean, in one launch, and its gradient back at the rows, in another.

    loss = sum_i loss_i, or that / n over the n rows that count        dscore_i = -dloss or -dloss / n, 0 if ignored

A row counts whose target is not the ignored index; a mean over none is NaN. Sums are in float32, in an order that N
alone decides. With torch's operators each would be three to five launches for a few kilobytes.
"""

import torch
import triton.language as tl
from torch import Tensor

from ..device import cdiv, on_device_of
from ..launch.entry import entry

_REDUCED, _SPREAD = 4096, 1024  # rows that a program holds at once


@entry
def linear_cross_entropy_reduce_kernel(
    loss_ptr, number_ptr,  # (): results; the second None for a sum
    losses_ptr, target_ptr,  # (N,)
    N, ignore_index, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: all rows."""
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    counted = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, N, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        total += tl.load(losses_ptr + rows, mask=rows < N, other=0.0)
        if number_ptr is not None:
            target = tl.load(target_ptr + rows, mask=rows < N, other=ignore_index)
            counted += (target != ignore_index).to(tl.int32)
    loss = tl.sum(total, axis=0)
    if number_ptr is not None:
        number = tl.sum(counted, axis=0).to(tl.float32)
        tl.store(number_ptr, number)
        loss = tl.math.div_rn(loss, number)
    tl.store(loss_ptr, loss.to(loss_ptr.dtype.element_ty))


@entry
def linear_cross_entropy_spread_kernel(
    score_grad_ptr,  # (N,): result, float32
    dloss_ptr, stride, number_ptr,  # of all rows (stride None) or of each; () or None
    target_ptr, N, ignore_index, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK rows."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if stride is None:
        dloss = tl.zeros((BLOCK,), dtype=tl.float32) + tl.load(dloss_ptr).to(tl.float32)
    else:
        dloss = tl.load(dloss_ptr + rows.to(tl.int64) * stride, mask=rows < N, other=0.0).to(tl.float32)
    if number_ptr is not None:
        dloss = tl.math.div_rn(dloss, tl.load(number_ptr))
    if ignore_index is not None:
        target = tl.load(target_ptr + rows, mask=rows < N, other=0)
        dloss = tl.where(target == ignore_index, 0.0, dloss)
    tl.store(score_grad_ptr + rows, -dloss, mask=rows < N)


def reduce_losses(
    losses: Tensor, target: Tensor, ignore_index: int | None, mean: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """losses (N,) float32, target (N,), contiguous -> sum or mean () in dtype, and the number in a mean () or None.

    Ignored rows have loss 0.
    """
    loss = torch.empty((), dtype=dtype, device=losses.device)
    number = torch.empty((), dtype=torch.float32, device=losses.device) if mean else None
    with on_device_of(losses):
        linear_cross_entropy_reduce_kernel[(1,)](
            loss, number, losses, target, len(losses), ignore_index, _REDUCED, num_warps=8
        )
    return loss, number


def spread_gradient(dloss: Tensor, number: Tensor | None, target: Tensor, ignore_index: int | None) -> Tensor:
    """dloss () or (N,), number as ``reduce_losses`` returns it, target (N,) -> gradient at the scores (N,), float32.

    Scores are the losses with the other sign. ignore_index: None where no row is ignored.
    """
    N = len(target)
    score_grad = torch.empty(N, dtype=torch.float32, device=target.device)
    stride = None if dloss.dim() == 0 else dloss.stride(0)
    with on_device_of(target):
        linear_cross_entropy_spread_kernel[(cdiv(N, _SPREAD),)](
            score_grad, dloss, stride, number, target, N, ignore_index, _SPREAD, num_warps=4
        )  # fmt: skip
    return score_grad
