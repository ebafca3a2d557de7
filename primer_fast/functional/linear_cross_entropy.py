"""Differentiable cross entropy of a linear layer's logits: checks here, math in kernels/."""

import torch
import torch.nn.functional as torch_F
from torch import Tensor

from primer_fast import library
from primer_fast.backend import autocast_dtype, autocast_to, needs_operator, runs_triton
from primer_fast.functional.logits import check, plain_is_best, rows_of

REDUCTIONS = ("mean", "sum", "none")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, b, target, options, dtype, keep):  # x (N, D), w (V, D), b (V,) or None, target (N,)
        _, ignore_index, smoothing = options
        losses, lse, kept = library.linear_cross_entropy.forward(x, w, b, target, ignore_index, smoothing, keep=keep)
        loss, number = _reduce(losses, target, options)
        ctx.save_for_backward(x, w, b, target, lse, number, kept)
        ctx.options, ctx.dtype = options, dtype
        return loss.to(dtype)

    @staticmethod
    def backward(ctx, dy):  # () or (N,)
        x, w, b, target, lse, number, kept = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # create_graph=True: torch's operators know their second derivatives
            return *_differentiable_grads(x, w, b, target, ctx.options, ctx.dtype, dy, needed), *[None] * 4
        reduction, ignore_index, smoothing = ctx.options
        dloss = dy.to(lse.dtype)
        dloss = dloss / number if reduction == "mean" else dloss
        grads = library.linear_cross_entropy.gradients(
            dloss, x, w, b, target, lse, ignore_index, smoothing, needed, kept
        )  # fmt: skip
        return *grads, *[None] * 4


def _reduce(losses, target, options):
    """-> loss () or (N,), and the number of rows in a mean"""
    reduction, ignore_index, _ = options
    if reduction == "none":
        return losses, None
    if reduction == "sum":
        return losses.sum(), None
    number = (target != ignore_index).sum()
    return losses.sum() / number, number


def _differentiable_grads(x, w, b, target, options, dtype, dy, needed):
    inputs = [t for t, need in zip((x, w, b), needed, strict=True) if need]
    reduction, ignore_index, smoothing = options
    loss = linear_cross_entropy_plain(
        x, w, target, linear_bias=b, reduction=reduction, ignore_index=ignore_index, label_smoothing=smoothing
    ).to(dtype)
    grads = iter(torch.autograd.grad(loss, inputs, dy, create_graph=True))
    return [next(grads) if need else None for need in needed]


def linear_cross_entropy(
    input: Tensor,  # (N, D) or (D,); leading axes beyond torch's are taken too
    linear_weight: Tensor,  # (V, D)
    target: Tensor,  # input's leading axes, int64
    *,
    linear_bias: Tensor | None = None,  # (V,)
    weight: None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    options: None = None,
    keep_logits: bool = False,
) -> Tensor:  # (), or as target for reduction "none"
    """``cross_entropy(linear(input, linear_weight, linear_bias), target)``, and the logits are never in memory.

    float32, float16 and bfloat16 on a GPU run in Triton; beside the gradients, the backward needs at most 256 MiB, a
    float32 tensor of the input's size and, beyond 16,384 rows, a float32 chunk of the weight's gradient. There,
    operands whose rows do not start on 16-byte boundaries are copied first. Other devices and dtypes take PyTorch's
    operators, on 8 MiB of logits at a time, or on all of them where they have at most 16 MiB. Gradients that are
    themselves differentiated take PyTorch's operators on the whole logits. Sums are in float32, for float64 in float64;
    two runs are bitwise equal. float32 products follow ``torch.get_float32_matmul_precision()``. Under autocast the
    products are in its dtype and the loss in float32, as torch's; otherwise the loss has the input's dtype.

    Args:
        target: a class for each row. On a GPU one that is neither in [0, V) nor ignored makes the loss and its
            gradients NaN.
        reduction: "mean" over the rows that count, NaN where none does; "sum"; or "none" for the loss of each row.
        ignore_index: target of rows that do not count; None: -100.
        label_smoothing: from 0 to 1, the share of the uniform distribution in the label.
        keep_logits: on a GPU, where a gradient will be wanted, keep the logits from the forward to the backward instead
            of making them twice: three products in place of four, for N V elements of the input's dtype, 2.5 GB at 8192
            rows and 151,936 classes in 16 bits. Loss and gradients are then those of logits rounded to that dtype, as
            torch's are. The backward may run more than once. Elsewhere it changes nothing.
        weight, options: not built; here so that torch's calls are understood.

    Raises:
        ValueError: the shapes or devices do not match, or an option is out of its range.
        TypeError: an argument is not a tensor, the dtypes differ, or ``target`` is not int64.
        IndexError: on a CPU, a target is neither a class nor ignored.
        NotImplementedError: class weights, class probabilities as target, losses of more axes, or ``options``.

    Source: torch.nn.functional.linear_cross_entropy; Wijmans et al., "Cut Your Losses in Large-Vocabulary Language
    Models" (2024), for the logits that are not in memory.
    """
    _check_options(linear_weight, target, weight, reduction, ignore_index, label_smoothing, options)
    ignore_index = -100 if ignore_index is None else ignore_index
    dtype = None if not isinstance(input, Tensor) else autocast_dtype(input)
    if dtype is not None:
        input, linear_weight, linear_bias = autocast_to(dtype, input, linear_weight, linear_bias)
    check("linear_cross_entropy", input, linear_weight, target, linear_bias)
    if plain_is_best(input, linear_weight, target):
        try:
            return linear_cross_entropy_plain(
                input, linear_weight, target, linear_bias=linear_bias,
                reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing,
            )  # fmt: skip
        except IndexError:
            _check_target(target.reshape(-1), len(linear_weight), ignore_index)
            raise
    x, flat_target, bias = rows_of(input, target, linear_bias)
    traced = needs_operator(x, linear_weight, bias, flat_target)
    if not runs_triton(x) and x.device.type == "cpu" and not traced:
        _check_target(flat_target, len(linear_weight), ignore_index)
    settings, loss_dtype = (
        (reduction, ignore_index, float(label_smoothing)),
        input.dtype if dtype is None else torch.float32,
    )
    rows = x, linear_weight, bias, flat_target, *settings[1:]
    differentiable = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, linear_weight, bias)
    )  # fmt: skip
    keep = keep_logits and differentiable and runs_triton(x)
    if traced:
        if keep:
            losses = library.linear_cross_entropy.linear_cross_entropy_kept(*rows)[0]
        else:
            losses = library.linear_cross_entropy.linear_cross_entropy(*rows)[0]
        loss = _reduce(losses, flat_target, settings)[0].to(loss_dtype)
    elif differentiable:
        loss = _LinearCrossEntropy.apply(x, linear_weight, bias, flat_target, settings, loss_dtype, keep)
    else:
        losses = library.linear_cross_entropy.forward(*rows)[0]
        loss = _reduce(losses, flat_target, settings)[0].to(loss_dtype)
    return loss.view(target.shape) if reduction == "none" else loss


def linear_cross_entropy_plain(
    input, linear_weight, target, *, linear_bias=None, reduction="mean", ignore_index=-100, label_smoothing=0.0
):
    """The same through torch's own operators, logits in memory."""
    logits = torch_F.linear(input, linear_weight, linear_bias)
    loss = torch_F.cross_entropy(
        logits.flatten(0, -2) if logits.dim() > 2 else logits, target.flatten() if target.dim() > 1 else target,
        reduction=reduction, ignore_index=-100 if ignore_index is None else ignore_index,
        label_smoothing=label_smoothing,
    )  # fmt: skip
    return loss.view(target.shape) if loss.dim() else loss


def _check_options(linear_weight, target, weight, reduction, ignore_index, label_smoothing, options):
    if (
        weight is None and options is None and reduction in REDUCTIONS
        and type(ignore_index) is int and type(label_smoothing) is float and 0 <= label_smoothing <= 1
        and isinstance(target, Tensor) and target.dtype is torch.int64
    ):  # fmt: skip
        return _check_axes(linear_weight)
    instead = "use torch.nn.functional.linear_cross_entropy"
    if weight is not None:
        raise NotImplementedError(f"linear_cross_entropy: weights of classes are not built; {instead}")
    if options is not None:
        raise NotImplementedError(f"linear_cross_entropy: options choose torch's own chunks; {instead}, or leave them")
    if isinstance(target, Tensor) and target.is_floating_point():
        raise NotImplementedError(f"linear_cross_entropy: class probabilities as target are not built; {instead}")
    _check_axes(linear_weight)
    if reduction not in REDUCTIONS:
        raise ValueError(f"linear_cross_entropy: reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    if not (ignore_index is None or isinstance(ignore_index, int)) or isinstance(ignore_index, bool):
        raise TypeError(f"linear_cross_entropy: ignore_index must be an integer or None; got {ignore_index!r}")
    if not (isinstance(label_smoothing, int | float) and 0 <= label_smoothing <= 1):
        raise ValueError(f"linear_cross_entropy: label_smoothing must be between 0 and 1; got {label_smoothing!r}")


def _check_axes(linear_weight):
    if isinstance(linear_weight, Tensor) and linear_weight.dim() > 2:
        raise NotImplementedError(
            f"linear_cross_entropy: losses of more axes are not built, linear_weight must have shape (V, D); got "
            f"{tuple(linear_weight.shape)}; use torch.nn.functional.linear_cross_entropy"
        )


def _check_target(target, classes, ignore_index):
    outside = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if outside.any():
        got = int(target[outside.nonzero()[0]])
        raise IndexError(
            f"linear_cross_entropy: target must be in [0, {classes}) or ignore_index {ignore_index}; got {got}"
        )
