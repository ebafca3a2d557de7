"""Differentiable cross entropy of a linear layer's logits: checks here, math in kernels/."""

__all__ = ["REDUCTIONS", "linear_cross_entropy", "linear_cross_entropy_plain"]

from typing import NamedTuple

import torch
import torch.nn.functional as torch_F
from torch import Tensor

from primer_fast.backend import (
    DTYPES,
    autocast,
    autocast_dtype,
    has_kernels,
    jit_traces,
    prepares,
    runs_triton,
    sharded,
    wants_gradient,
)
from primer_fast.functional.logits import (
    as_they_are,
    check,
    check_ignore_index,
    check_target,
    chunked_bwd,
    chunked_fwd,
    like_kept,
    plain_is_best,
    rows_of,
    sums_dtype,
    wide_logits,
)
from primer_fast.functional.operator import (
    differentiable,
    differentiates,
    eager,
    gradients_of,
    needs_operator,
    operator,
)
from primer_fast.functional.weighted_losses import check_weighted, weighted_losses, weighted_reduction, weights_of
from primer_fast.kernels.launch.prepared import prepared
from primer_fast.kernels.linear_cross_entropy import linear_cross_entropy_bwd, linear_cross_entropy_fwd
from primer_fast.kernels.logits import Head
from primer_fast.kernels.logits.row_losses import reduce_losses

REDUCTIONS = ("mean", "sum", "none")
LOSS_DTYPES = (*DTYPES, torch.float64)


class _Reduced(NamedTuple):
    """What a loss is told beside its tensors."""

    reduction: str
    ignore_index: int
    smoothing: float
    dtype: torch.dtype  # of the loss
    keep: bool  # the logits, for the gradients


def linear_cross_entropy(
    input: Tensor,  # (N, D) or (D,); leading axes beyond torch's are taken too
    linear_weight: Tensor,  # (V, D)
    target: Tensor,  # input's leading axes, int64; or probabilities, these axes and V
    *,
    linear_bias: Tensor | None = None,  # (V,)
    weight: Tensor | None = None,  # (V,)
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    options: None = None,
    keep_logits: bool = False,
    loss_dtype: torch.dtype | None = None,
) -> Tensor:  # (), or as target for reduction "none"
    """``cross_entropy(linear(input, linear_weight, linear_bias), target)``, and the logits are never in memory.

    float32, float16 and bfloat16 on a GPU run in Triton; beside the gradients, the backward needs at most 256 MiB, a
    float32 tensor of the input's size and, beyond 16,384 rows, a float32 chunk of the weight's gradient. There,
    operands whose rows do not start on 16-byte boundaries are copied first. Other devices and dtypes take PyTorch's
    operators, on 8 MiB of logits at a time, or on all of them where they have at most 16 MiB. Gradients that are
    themselves differentiated take PyTorch's operators on the whole logits. Sums are in float32, for float64 in float64;
    two runs are bitwise equal. float32 products follow ``torch.get_float32_matmul_precision()``. Under autocast the
    products are in its dtype and the loss in float32, as torch's; otherwise the loss has the input's dtype.

    With weights w of classes and targets q, probabilities or 1 at the class, the loss of a row is torch's,
    ``-sum_v w_v ((1 - s) q_v + s / V) log p_v`` for label smoothing s. Class indices with weights and without smoothing
    run as without weights. Probabilities, and weights with smoothing, take PyTorch's operators in float32 on every
    device: on 64 MiB of logits at a time, which the backward makes again, beside a float32 copy of ``linear_weight``;
    and on all logits where they have at most 16 MiB.

    Args:
        target: a class for each row. On a GPU one that is neither in [0, V) nor ignored makes the loss and its
            gradients NaN. Or floating-point probabilities of the classes for each row, with gradients of their own.
        weight: of each class, constant, in any floating-point dtype; None: 1.
        reduction: "mean" over the rows that count, NaN where none does; "sum"; or "none" for the loss of each row. With
            weights the mean of class indices is the sum over the weights of the targets that count; that of
            probabilities is over the number of rows.
        ignore_index: target of rows that do not count; None: -100. Probabilities have none.
        label_smoothing: from 0 to 1, the share of the uniform distribution in the label.
        keep_logits: on a GPU, where a gradient will be wanted, keep the logits from the forward to the backward instead
            of making them twice: three products in place of four, for N V elements of the input's dtype, 2.5 GB at 8192
            rows and 151,936 classes in 16 bits. Loss and gradients are then those of logits rounded to that dtype, as
            torch's are. The backward may run more than once. Elsewhere it changes nothing.
        loss_dtype: of the loss, float32 or another floating-point dtype; None: as above. A loss of 10 has steps of 0.06
            in bfloat16, and a sum in float16 ends at 65,504. Sums and gradients do not depend on it.
        options: not built; here so that torch's calls are understood.

    Raises:
        ValueError: the shapes or devices do not match, or an option is out of its range.
        TypeError: an argument is not a tensor, the dtypes differ, ``target`` is neither int64 nor floating-point, or an
            option is of another type.
        IndexError: on a CPU, a target is neither a class nor ignored.
        NotImplementedError: losses of more axes, or ``options``.

    Source: torch.nn.functional.linear_cross_entropy; Wijmans et al., "Cut Your Losses in Large-Vocabulary Language
    Models" (2024), for the logits that are not in memory.
    """
    dtype = autocast_dtype(input) if isinstance(input, Tensor) else None
    input, linear_weight, linear_bias = autocast(input, linear_weight, linear_bias)
    ignore_index = -100 if ignore_index is None else ignore_index
    tensors, told = (input, linear_weight, linear_bias, target), (reduction, ignore_index, label_smoothing)
    if weight is None and options is None and prepares(input):
        own = _told(input, linear_weight, linear_bias, *told, dtype, loss_dtype, keep_logits)
        plan = _launch.known(*tensors, own, torch.get_float32_matmul_precision())
        if plan is not None:
            return _run(plan, tensors, own)
    _check_options(linear_weight, target, reduction, ignore_index, label_smoothing, options, loss_dtype)
    probabilities = isinstance(target, Tensor) and target.is_floating_point()
    if not jit_traces():
        check("linear_cross_entropy", input, linear_weight, target, linear_bias, probabilities)
    if weight is not None or probabilities:
        check_weighted(linear_weight, target, weight, ignore_index)
        if sharded(*tensors):
            raise NotImplementedError("linear_cross_entropy: weight and probabilities are not built for DTensors")
        result = input.dtype if dtype is None else torch.float32
        if probabilities or label_smoothing > 0:
            found = weighted_losses(*tensors, weight, ignore_index, float(label_smoothing))
        else:
            found = _losses_of_classes(*tensors, weight, ignore_index, keep_logits)
        return weighted_reduction(found, target, weight, reduction, ignore_index).to(loss_dtype or result)
    if plain_is_best(input, linear_weight, target):
        try:
            return linear_cross_entropy_plain(
                input, linear_weight, target, linear_bias=linear_bias,
                reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing, loss_dtype=loss_dtype,
            )  # fmt: skip
        except IndexError:
            check_target("linear_cross_entropy", target, len(linear_weight), ignore_index)
            raise
    own = _told(input, linear_weight, linear_bias, *told, dtype, loss_dtype, keep_logits)
    if sharded(*tensors):
        from primer_fast.functional import shards

        def run(x, w, b, t):
            return linear_cross_entropy(
                x, w, t, linear_bias=b, reduction="none", ignore_index=ignore_index, label_smoothing=label_smoothing,
                keep_logits=keep_logits, loss_dtype=sums_dtype(x),
            )  # fmt: skip

        (losses,) = shards.loss_rows("linear_cross_entropy", run, *tensors, 1)
        return shards.reduced(losses, target, reduction, ignore_index).to(own.dtype)
    if needs_operator(*tensors):
        return _traced(*tensors, own)
    if not runs_triton(input) and input.device.type == "cpu":
        check_target("linear_cross_entropy", target, len(linear_weight), ignore_index)
    return _run(lambda x, w, b, t: _loss(x, w, b, t, own), tensors, own)


def _told(input, linear_weight, linear_bias, reduction, ignore_index, smoothing, dtype, loss_dtype, keep_logits):
    """What the launchers are told; dtype: autocast's, or None."""
    if loss_dtype is not None:
        dtype = loss_dtype
    else:
        dtype = input.dtype if dtype is None else torch.float32
    keep = keep_logits and wants_gradient(input, linear_weight, linear_bias)
    return _Reduced(reduction, ignore_index, smoothing, dtype, keep)


def _run(run, tensors, told):
    return _apply(*tensors[:3], (tensors[3], told), run) if wants_gradient(*tensors) else run(*tensors)[0]


def _traced(input, linear_weight, linear_bias, target, told):
    """The loss through the library's operators, of which a compiler knows the shapes alone."""
    x, flat_target, bias = rows_of(input, target, linear_bias)
    keep = wants_gradient(input, linear_weight, linear_bias)
    call = _call_kept if told.keep and runs_triton(x) else _call
    losses = call(keep, x, linear_weight, bias, flat_target, told.ignore_index, float(told.smoothing))
    if told.reduction == "none":
        return losses.view(target.shape).to(told.dtype)
    return _call_reduced(keep, losses, flat_target, told.ignore_index, told.reduction == "mean").to(told.dtype)


def _loss(x, w, b, target, options: _Reduced):
    """x (..., D), w (V, D), b (V,) or None, target (...) -> loss () or as target, then what the gradients need: lse,
    the number of rows in a mean or None, the logits or None.
    """
    if has_kernels(x):
        return _launch(x, w, b, target, options, torch.get_float32_matmul_precision())
    rows, flat, b = rows_of(x, target, b)
    head = Head(1.0, options.smoothing, options.ignore_index, -1.0)
    with as_they_are(x):
        losses, lse, _ = chunked_fwd(rows, w, b, flat, head, False)
    reduced, number = _reduce(losses, flat, options.reduction, options.ignore_index)
    return (reduced.view(target.shape) if reduced.dim() else reduced).to(options.dtype), lse, number, None


def _rows(x, w, b, target, ignore_index, smoothing, keep):
    """The loss of each row, 0 for ignored ones, lse (2, N), and the logits where they are kept."""
    losses, lse, _, kept = _loss(x, w, b, target, _Reduced("none", ignore_index, smoothing, sums_dtype(x), keep))
    return losses, lse, kept


@prepared(4)
def _launch(x, w, b, target, options, precision):
    rows, flat, b = rows_of(x, target, b)
    losses, lse, kept = linear_cross_entropy_fwd(
        rows, w, b, flat, options.ignore_index, float(options.smoothing), precision, keep=options.keep
    )  # fmt: skip
    if options.reduction == "none":
        return losses.view(target.shape).to(options.dtype), lse, None, kept
    mean = options.reduction == "mean"
    reduced, number = reduce_losses(losses, flat, options.ignore_index, mean, options.dtype)
    return reduced, lse, number, kept


@prepared(8)
def _launch_backward(dloss, x, w, b, target, lse, number, kept, ignore_index, smoothing, needed, precision):
    rows, target, b = rows_of(x, target, b)
    dx, dw, db = linear_cross_entropy_bwd(
        dloss if dloss.dim() == 0 else dloss.reshape(-1), rows, w, b, target, lse, smoothing, needed, precision,
        kept=kept, ignore_index=ignore_index, number=number,
    )  # fmt: skip
    return dx if dx is None else dx.view(x.shape), dw, db


def _loss_gradients(dlosses, x, w, b, target, lse, kept, ignore_index, smoothing, needed):
    """dlosses (N,), and the arguments and results of ``_rows`` -> dx, dw, db, None for each that is not needed."""
    if has_kernels(x):
        own = ignore_index, smoothing, tuple(needed), torch.get_float32_matmul_precision()
        return _launch_backward(dlosses, x, w, b, target, lse, None, kept, *own)
    with as_they_are(x):
        return chunked_bwd(-dlosses, None, x, w, b, target, lse, None, Head(1.0, smoothing, ignore_index), needed)


def _reduce(losses, target, reduction, ignore_index):
    """-> loss () or (N,), and the number of rows in a mean, through torch's own operators"""
    if reduction == "none":
        return losses, None
    if reduction == "sum":
        return losses.sum(), None
    number = (target != ignore_index).sum()
    return losses.sum() / number, number


@operator("linear_cross_entropy")
def _forward(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor,
    ignore_index: int, label_smoothing: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> the loss of each row, lse"""
    return _rows(input, linear_weight, linear_bias, target, ignore_index, label_smoothing, False)[:2]


def _like_losses(input, *_):
    losses = input.new_empty(input.shape[0], dtype=sums_dtype(input))
    return losses, losses.new_empty(2, input.shape[0])


@operator("linear_cross_entropy_kept")
def _forward_kept(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor,
    ignore_index: int, label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> the loss of each row, lse, logits, which are kept for the gradients"""
    return _rows(input, linear_weight, linear_bias, target, ignore_index, label_smoothing, True)


_forward.register_fake(_like_losses)
_forward_kept.register_fake(lambda input, weight, *_: (*_like_losses(input), like_kept(input, weight)))


@operator("linear_cross_entropy_backward")
def _gradients(
    dlosses: Tensor, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, lse: Tensor,
    ignore_index: int, label_smoothing: float, needed: list[bool],
) -> list[Tensor]:  # fmt: skip
    tensors = dlosses, input, linear_weight, linear_bias, target, lse
    return _loss_gradients(*tensors, None, ignore_index, label_smoothing, needed)


@operator("linear_cross_entropy_kept_backward")
def _gradients_kept(
    dlosses: Tensor, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, lse: Tensor,
    logits: Tensor, ignore_index: int, label_smoothing: float, needed: list[bool],
) -> list[Tensor]:  # fmt: skip
    tensors = dlosses, input, linear_weight, linear_bias, target, lse, logits
    return _loss_gradients(*tensors, ignore_index, label_smoothing, needed)


def _like_gradients(dlosses, input, linear_weight, *_):
    return [input.new_empty(s) for s in (input.shape, linear_weight.shape, linear_weight.shape[:1])]


_gradients.register_fake(_like_gradients)
_gradients_kept.register_fake(_like_gradients)


@operator("linear_cross_entropy_reduced")
def _forward_reduced(losses: Tensor, target: Tensor, ignore_index: int, mean: bool) -> Tensor:
    """The sum of the losses (N,), or their mean over the rows that count: as ``_loss`` adds them, bit by bit."""
    if has_kernels(losses):
        return reduce_losses(losses, target, ignore_index, mean, losses.dtype)[0]
    return _reduce(losses, target, "mean" if mean else "sum", ignore_index)[0]


@_forward_reduced.register_fake
def _(losses, target, ignore_index, mean):
    return losses.new_empty(())


def _setup(ctx, inputs, output):
    x, w, b, target, ctx.options = inputs
    _, lse, number, kept = output
    ctx.save_for_backward(x, w, b, target, lse, number, kept)


def _setup_rows(ctx, inputs, output):
    """The losses of rows as a loss that is not reduced."""
    *tensors, ignore_index, smoothing = inputs
    losses, lse, *kept = output
    options = _Reduced("none", ignore_index, smoothing, losses.dtype, len(kept) > 0)
    _setup(ctx, (*tensors, options), (losses, lse, None, *(kept or (None,))))


def _backward(ctx, dloss):
    x, w, b, target, lse, number, kept = ctx.saved_tensors
    needed, options = ctx.needs_input_grad[:3], ctx.options
    if differentiates(dloss):

        def plain():
            return linear_cross_entropy_plain(
                x, w, target, linear_bias=b, reduction=options.reduction, ignore_index=options.ignore_index,
                label_smoothing=options.smoothing, loss_dtype=options.dtype,
            )  # fmt: skip

        return gradients_of(plain, (x, w, b), needed, dloss)
    own = options.ignore_index, options.smoothing
    if has_kernels(x) and not needs_operator(dloss, x, w, b, target):
        precision = torch.get_float32_matmul_precision()
        return _launch_backward(dloss, x, w, b, target, lse, number, kept, *own, tuple(needed), precision)
    rows, flat, b = rows_of(x, target, b)
    dlosses = dloss.reshape(-1).to(lse.dtype)
    dlosses = (dlosses if number is None else dlosses / number).expand(flat.shape)
    if kept is None:
        dx, dw, db = _gradients(dlosses, rows, w, b, flat, lse, *own, needed)
    else:
        dx, dw, db = _gradients_kept(dlosses, rows, w, b, flat, lse, kept, *own, needed)
    return dx if dx is None else dx.view(x.shape), dw, db


def _setup_reduced(ctx, inputs, output):
    _, target, ctx.ignore_index, ctx.mean = inputs
    ctx.save_for_backward(target)


def _backward_reduced(ctx, dloss):
    (target,) = ctx.saved_tensors
    dloss = dloss / (target != ctx.ignore_index).sum() if ctx.mean else dloss
    return (dloss.expand(target.shape),)


_apply = eager("linear_cross_entropy", _setup, _backward, leading=3, tensors=4)
_call = differentiable(_forward, _setup_rows, _backward, leading=3)[0]
_call_kept = differentiable(_forward_kept, _setup_rows, _backward, leading=3)[0]
_call_reduced = differentiable(_forward_reduced, _setup_reduced, _backward_reduced, leading=1)[0]


def _losses_of_classes(input, linear_weight, linear_bias, target, weight, ignore_index, keep_logits):
    """-> weighted losses of the rows, as the target: those without weights, each times its own."""
    losses = linear_cross_entropy(
        input, linear_weight, target, linear_bias=linear_bias, reduction="none", ignore_index=ignore_index,
        keep_logits=keep_logits, loss_dtype=sums_dtype(input),
    )  # fmt: skip
    return losses * weights_of(target, weight, ignore_index).to(losses.dtype)


def linear_cross_entropy_plain(
    input, linear_weight, target, *, linear_bias=None, reduction="mean", ignore_index=-100, label_smoothing=0.0,
    loss_dtype=None,
):  # fmt: skip
    """The same through torch's own operators, logits in memory."""
    logits = wide_logits(input, linear_weight, linear_bias)
    loss = torch_F.cross_entropy(
        logits.flatten(0, -2) if logits.dim() > 2 else logits, target.flatten() if target.dim() > 1 else target,
        reduction=reduction, ignore_index=-100 if ignore_index is None else ignore_index,
        label_smoothing=label_smoothing,
    )  # fmt: skip
    loss = loss.to(loss_dtype or (input.dtype if autocast_dtype(input) is None else torch.float32))
    return loss.view(target.shape) if loss.dim() else loss


def _check_options(linear_weight, target, reduction, ignore_index, label_smoothing, options, loss_dtype):
    if (
        options is None and loss_dtype is None and reduction in REDUCTIONS
        and type(ignore_index) is int and type(label_smoothing) is float and 0 <= label_smoothing <= 1
        and isinstance(target, Tensor) and target.dtype is torch.int64
    ):  # fmt: skip
        return _check_axes(linear_weight)
    instead = "use torch.nn.functional.linear_cross_entropy"
    if options is not None:
        raise NotImplementedError(f"linear_cross_entropy: options choose torch's own chunks; {instead}, or leave them")
    _check_axes(linear_weight)
    if reduction not in REDUCTIONS:
        raise ValueError(f"linear_cross_entropy: reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    check_ignore_index("linear_cross_entropy", ignore_index)
    if not (isinstance(label_smoothing, int | float) and 0 <= label_smoothing <= 1):
        raise ValueError(f"linear_cross_entropy: label_smoothing must be between 0 and 1; got {label_smoothing!r}")
    if not (loss_dtype is None or loss_dtype in LOSS_DTYPES):
        raise TypeError(
            f"linear_cross_entropy: loss_dtype must be a floating-point torch.dtype or None; got {loss_dtype!r}"
        )


def _check_axes(linear_weight):
    if isinstance(linear_weight, Tensor) and linear_weight.dim() > 2:
        raise NotImplementedError(
            f"linear_cross_entropy: losses of more axes are not built, linear_weight must have shape (V, D); got "
            f"{tuple(linear_weight.shape)}; use torch.nn.functional.linear_cross_entropy"
        )
