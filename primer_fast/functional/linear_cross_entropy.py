"""Differentiable cross entropy of a linear layer's logits: checks here, math in kernels/."""

import torch
import torch.nn.functional as torch_F
from torch import Tensor

from primer_fast import library
from primer_fast.backend import (
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
from primer_fast.functional.logits import check, plain_is_best

REDUCTIONS = ("mean", "sum", "none")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, x, w, b, target, options):  # x (..., D), w (V, D), b (V,) or None, target (...)
        loss, lse, number, kept = run(x, w, b, target)
        ctx.save_for_backward(x, w, b, target, lse, number, kept)
        ctx.options = options
        return loss

    @staticmethod
    def backward(ctx, dy):  # () or (...)
        x, w, b, target, lse, number, kept = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:4]
        if differentiates(dy):
            return None, *_differentiable_grads(x, w, b, target, ctx.options, dy, needed), None, None
        grads = library.linear_cross_entropy.loss_gradients(
            dy, x, w, b, target, lse, number, kept, ctx.options, needed
        )  # fmt: skip
        return None, *grads, None, None


_apply = apply_of(_LinearCrossEntropy)


def _differentiable_grads(x, w, b, target, options, dy, needed):
    def plain():
        return linear_cross_entropy_plain(
            x, w, target, linear_bias=b, reduction=options.reduction, ignore_index=options.ignore_index,
            label_smoothing=options.smoothing,
        ).to(options.dtype)  # fmt: skip

    return gradients_of(plain, (x, w, b), needed, dy)


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
    dtype = autocast_dtype(input) if isinstance(input, Tensor) else None
    if dtype is not None:
        input, linear_weight, linear_bias = autocast_to(dtype, input, linear_weight, linear_bias)
    ignore_index = -100 if ignore_index is None else ignore_index
    tensors, told = (input, linear_weight, linear_bias, target), (reduction, ignore_index, label_smoothing)
    if weight is None and options is None and prepares(input):
        own = _told(input, linear_weight, linear_bias, *told, dtype, keep_logits)
        plan = library.linear_cross_entropy.known(*tensors, own, torch.get_float32_matmul_precision())
        if plan is not None:
            return _run(plan, tensors, own)
    _check_options(linear_weight, target, weight, reduction, ignore_index, label_smoothing, options)
    if not jit_traces():
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
    own = _told(input, linear_weight, linear_bias, *told, dtype, keep_logits)
    if sharded(*tensors):
        from primer_fast.functional import shards

        def run(x, w, b, t):
            return linear_cross_entropy(
                x, w, t, linear_bias=b, reduction="none", ignore_index=ignore_index, label_smoothing=label_smoothing,
                keep_logits=keep_logits,
            )  # fmt: skip

        (losses,) = shards.loss_rows("linear_cross_entropy", run, *tensors, 1)
        return shards.reduced(losses, target, reduction, ignore_index)
    if needs_operator(*tensors):
        return _traced(*tensors, own)
    if not runs_triton(input) and input.device.type == "cpu":
        _check_target(target, len(linear_weight), ignore_index)
    return _run(lambda x, w, b, t: library.linear_cross_entropy.loss(x, w, b, t, own), tensors, own)


def _told(input, linear_weight, linear_bias, reduction, ignore_index, smoothing, dtype, keep_logits):
    """What the launchers are told; dtype: autocast's, or None."""
    dtype = input.dtype if dtype is None else torch.float32
    keep = keep_logits and wants_gradient(input, linear_weight, linear_bias)
    return library.linear_cross_entropy.Reduced(reduction, ignore_index, smoothing, dtype, keep)


def _run(run, tensors, told):
    return _apply(run, *tensors, told) if wants_gradient(*tensors) else run(*tensors)[0]


def _traced(input, linear_weight, linear_bias, target, told):
    """The loss through the library's operators, of which a compiler knows the shapes alone."""
    x, flat_target, bias = library.logits.rows_of(input, target, linear_bias)
    rows = x, linear_weight, bias, flat_target, told.ignore_index, float(told.smoothing)
    if told.keep and runs_triton(x):
        losses = library.linear_cross_entropy.linear_cross_entropy_kept(*rows)[0]
    else:
        losses = library.linear_cross_entropy.linear_cross_entropy(*rows)[0]
    if told.reduction == "none":
        return losses.view(target.shape).to(told.dtype)
    mean = told.reduction == "mean"
    reduced = library.linear_cross_entropy.linear_cross_entropy_reduced(losses, flat_target, told.ignore_index, mean)
    return reduced.to(told.dtype)


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
