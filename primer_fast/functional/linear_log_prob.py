"""Differentiable log-probability of a target under a linear layer's softmax: checks here, math in kernels/."""

__all__ = ["check_temperature", "linear_log_prob", "linear_log_prob_plain"]

from typing import Literal, overload

import torch
from torch import Tensor

from primer_fast.backend import (
    autocast,
    has_kernels,
    jit_traces,
    prepares,
    runs_triton,
    sharded,
    wants_gradient,
)
from primer_fast.functional.logits import (
    LEAST,
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
from primer_fast.functional.operator import differentiable, differentiates, gradients_of, needs_operator, operator
from primer_fast.kernels.launch.prepared import prepared
from primer_fast.kernels.linear_log_prob import linear_log_prob_bwd, linear_log_prob_fwd
from primer_fast.kernels.logits import Head


@overload
def linear_log_prob(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None,
    temperature: float = 1.0, return_entropy: Literal[False] = False, ignore_index: int | None = -100,
    keep_logits: bool = False,
) -> Tensor: ...  # fmt: skip
@overload
def linear_log_prob(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None,
    temperature: float = 1.0, return_entropy: Literal[True], ignore_index: int | None = -100,
    keep_logits: bool = False,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def linear_log_prob(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None,
    temperature: float = 1.0, return_entropy: bool, ignore_index: int | None = -100,
    keep_logits: bool = False,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def linear_log_prob(
    input: Tensor,  # (..., D)
    linear_weight: Tensor,  # (V, D)
    target: Tensor,  # (...) int64
    *,
    linear_bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    return_entropy: bool = False,
    ignore_index: int | None = -100,
    keep_logits: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # (...) float32, with return_entropy twice
    """``log softmax((input @ linear_weight.T + linear_bias) / temperature)[target]``, and the entropy, both in nats.

    The logits are never in memory. float32, float16 and bfloat16 on a GPU run in Triton; beside the gradients, the
    backward needs at most 256 MiB, a float32 tensor of the input's size and, beyond 16,384 rows, a float32 chunk of the
    weight's gradient. There, operands whose rows do not start on 16-byte boundaries are copied first. Other devices and
    dtypes take PyTorch's operators, on 8 MiB of logits at a time, or on all of them where they have at most 16 MiB.
    Both outputs have gradients, for any upstream gradient of each row. Gradients that are themselves differentiated
    take PyTorch's operators on the whole logits. Sums are in float32, for float64 in float64, and so are the results;
    two runs are bitwise equal. float32 products follow ``torch.get_float32_matmul_precision()``. Autocast casts the
    floating-point arguments as for ``linear``.

    Args:
        target: a class for each row. On a GPU one that is neither in [0, V) nor ignored makes the row's log-probability
            and its gradients NaN.
        temperature: divides the logits, bias included.
        return_entropy: return also the entropy of each row's softmax, where 0 log 0 = 0.
        ignore_index: target of rows that do not count, as padding does not; None: -100. Their log-probability and
            entropy are 0 and they take no gradient, so that a sum over a row of tokens is that of its completion.
        keep_logits: on a GPU, where a gradient will be wanted, keep the logits from the forward to the backward instead
            of making them twice: three products in place of four, for N V elements of the input's dtype, 2.1 GB at 8192
            rows and 131,072 classes in 16 bits. Results and gradients are then those of logits rounded to that dtype.
            The backward may run more than once. Elsewhere it changes nothing.

    Raises:
        ValueError: the shapes or devices do not match, or ``temperature`` is not from 1e-30 to 1e30.
        TypeError: an argument is not a tensor, the dtypes differ, ``target`` is not int64, or ``ignore_index`` is
            neither an integer nor None.
        IndexError: on a CPU, a target is neither a class nor ignored.

    Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models" (2024), for the logits that are not
    in memory; PPO's and DPO's objectives are made of these log-probabilities.
    """
    input, linear_weight, linear_bias = autocast(input, linear_weight, linear_bias)
    ignore_index = -100 if ignore_index is None else ignore_index
    tensors, told = (input, linear_weight, linear_bias, target), (temperature, return_entropy, ignore_index)
    if prepares(input):
        keep = keep_logits and wants_gradient(*tensors)
        plan = _launch.known(*tensors, *told, keep, torch.get_float32_matmul_precision())
        if plan is not None:
            return _run(plan, tensors, *told)
    check_temperature(temperature)
    check_ignore_index("linear_log_prob", ignore_index)
    if not jit_traces():
        check("linear_log_prob", input, linear_weight, target, linear_bias)
    if plain_is_best(input, linear_weight, target):
        return linear_log_prob_plain(
            input, linear_weight, target, linear_bias=linear_bias,
            temperature=temperature, return_entropy=return_entropy, ignore_index=ignore_index,
        )  # fmt: skip
    if sharded(*tensors):
        from primer_fast.functional import shards

        def run_local(x, w, b, t):
            return linear_log_prob(
                x, w, t, linear_bias=b, temperature=temperature, return_entropy=return_entropy, keep_logits=keep_logits,
                ignore_index=ignore_index,
            )  # fmt: skip

        results = shards.loss_rows("linear_log_prob", run_local, *tensors, 1 + return_entropy)
        return results if return_entropy else results[0]
    keep = keep_logits and wants_gradient(*tensors)
    if not needs_operator(*tensors):
        if not runs_triton(input) and input.device.type == "cpu":
            check_target("linear_log_prob", target, len(linear_weight), ignore_index)
        return _run(lambda x, w, b, t: _scores(x, w, b, t, *told, keep), tensors, *told)
    x, flat_target, bias = rows_of(input, target, linear_bias)
    call = _call_kept if keep and runs_triton(x) else _call
    results = call(wants_gradient(*tensors), x, linear_weight, bias, flat_target, float(temperature), *told[1:])
    if not return_entropy:
        return results.view(target.shape)
    y, entropy = results
    return y.view(target.shape), entropy.view(target.shape)


def _run(run, tensors, temperature, return_entropy, ignore_index):
    if wants_gradient(*tensors):
        return _apply(*tensors[:3], (tensors[3], temperature, return_entropy, ignore_index), run)
    y, _, entropy, _ = run(*tensors)
    return (y, entropy) if return_entropy else y


def _scores(x, w, b, target, temperature, entropy, ignore_index, keep=False):
    """x (..., D), w (V, D), b (V,) or None, target (...) -> y as target, lse (2, N), entropy as target or None, and the
    logits that the Triton kernels ``keep`` for the gradients, or None.
    """
    if has_kernels(x):
        return _launch(x, w, b, target, temperature, entropy, ignore_index, keep, torch.get_float32_matmul_precision())
    rows, flat, b = rows_of(x, target, b)
    with as_they_are(x):
        y, lse, found = chunked_fwd(rows, w, b, flat, Head(temperature, ignore_index=ignore_index), entropy)
    return y.view(target.shape), lse, found if found is None else found.view(target.shape), None


def _score_gradients(dy, dentropy, x, w, b, target, lse, entropy, kept, temperature, ignore_index, needed):
    """dy as target, dentropy likewise or None as entropy -> dx, dw, db, None for each that is not needed."""
    if has_kernels(x):
        options = temperature, ignore_index, tuple(needed), torch.get_float32_matmul_precision()
        return _launch_backward(dy, dentropy, x, w, b, target, lse, entropy, kept, *options)
    rows, flat, b = rows_of(x, target, b)
    dy, dentropy, entropy = map(_flat, (dy, dentropy, entropy))
    head = Head(temperature, ignore_index=ignore_index)
    with as_they_are(x):
        dx, dw, db = chunked_bwd(dy, dentropy, rows, w, b, flat, lse, entropy, head, needed)
    return dx if dx is None else dx.view(x.shape), dw, db


@prepared(4)
def _launch(x, w, b, target, temperature, entropy, ignore_index, keep, precision):
    rows, flat, b = rows_of(x, target, b)
    y, lse, found, kept = linear_log_prob_fwd(
        rows, w, b, flat, float(temperature), entropy, precision, keep=keep, ignore_index=ignore_index
    )  # fmt: skip
    return y.view(target.shape), lse, found if found is None else found.view(target.shape), kept


@prepared(9)
def _launch_backward(dy, dentropy, x, w, b, target, lse, entropy, kept, temperature, ignore_index, needed, precision):
    rows, flat, b = rows_of(x, target, b)
    dx, dw, db = linear_log_prob_bwd(
        *map(_flat, (dy, dentropy)), rows, w, b, flat, lse, _flat(entropy), float(temperature), needed, precision,
        kept=kept, ignore_index=ignore_index,
    )  # fmt: skip
    return dx if dx is None else dx.view(x.shape), dw, db


def _flat(t):
    """Numbers of rows as one axis, adjacent in memory; None stays None."""
    return t if t is None else t.reshape(-1).contiguous()


@operator("linear_log_prob")
def _forward(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor,
    temperature: float, return_entropy: bool, ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> y, lse, entropy"""
    return _scores(input, linear_weight, linear_bias, target, temperature, return_entropy, ignore_index)[:3]


def _like_scores(input, linear_weight, linear_bias, target, temperature, return_entropy, ignore_index):
    y = input.new_empty(input.shape[0], dtype=sums_dtype(input))
    return y, y.new_empty(2, input.shape[0]), torch.empty_like(y) if return_entropy else None


@operator("linear_log_prob_kept")
def _forward_kept(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor,
    temperature: float, return_entropy: bool, ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> y, lse, entropy, logits, which are kept for the gradients"""
    return _scores(input, linear_weight, linear_bias, target, temperature, return_entropy, ignore_index, keep=True)


_forward.register_fake(_like_scores)
_forward_kept.register_fake(lambda *inputs: (*_like_scores(*inputs), like_kept(*inputs[:2])))


@operator("linear_log_prob_backward")
def _gradients(
    dy: Tensor, dentropy: Tensor | None, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None,
    target: Tensor, lse: Tensor, entropy: Tensor | None, temperature: float, ignore_index: int,
    needed: list[bool],
) -> list[Tensor]:  # fmt: skip
    tensors = dy, dentropy, input, linear_weight, linear_bias, target, lse, entropy
    return _score_gradients(*tensors, None, temperature, ignore_index, needed)


@operator("linear_log_prob_kept_backward")
def _gradients_kept(
    dy: Tensor, dentropy: Tensor | None, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None,
    target: Tensor, lse: Tensor, entropy: Tensor | None, logits: Tensor, temperature: float, ignore_index: int,
    needed: list[bool],
) -> list[Tensor]:  # fmt: skip
    tensors = dy, dentropy, input, linear_weight, linear_bias, target, lse, entropy, logits
    return _score_gradients(*tensors, temperature, ignore_index, needed)


def _like_gradients(dy, dentropy, input, linear_weight, *_):
    return [input.new_empty(s) for s in (input.shape, linear_weight.shape, linear_weight.shape[:1])]


_gradients.register_fake(_like_gradients)
_gradients_kept.register_fake(_like_gradients)


def _setup(ctx, inputs, output):
    x, w, b, target, ctx.temperature, return_entropy, ctx.ignore_index = inputs
    kept = output[3] if len(output) > 3 else None
    ctx.save_for_backward(x, w, b, target, output[1], output[2] if return_entropy else None, kept)


def _backward(ctx, dy, dentropy=None):
    x, w, b, target, lse, entropy, kept = ctx.saved_tensors
    needed = ctx.needs_input_grad[:3]
    if differentiates(dy, dentropy):
        both = dentropy is not None

        def plain():
            return linear_log_prob_plain(
                x, w, target, linear_bias=b, temperature=ctx.temperature, return_entropy=both,
                ignore_index=ctx.ignore_index,
            )  # fmt: skip

        return gradients_of(plain, (x, w, b), needed, (dy, dentropy) if both else dy)
    tensors, options = (dy, dentropy, x, w, b, target, lse, entropy), (ctx.temperature, ctx.ignore_index, needed)
    return _gradients(*tensors, *options) if kept is None else _gradients_kept(*tensors, kept, *options)


def _results(inputs, output):
    return (output[0], output[2]) if inputs[5] else output[0]  # y, and the entropy where it was asked for


_call, _apply = differentiable(_forward, _setup, _backward, 3, _results, zeros=True)
_call_kept = differentiable(_forward_kept, _setup, _backward, 3, _results, zeros=True)[0]


def _chosen(log_probs, target, ignore_index):  # (..., V), (...)
    """-> the target's (...), 0 where it is ignored; and which are, or None where none is."""
    classes = log_probs.shape[-1]
    looks = target.is_cpu and type(log_probs) is Tensor and not (torch.compiler.is_compiling() or jit_traces())
    if looks and not 0 <= ignore_index < classes:
        try:
            return log_probs.gather(-1, target.unsqueeze(-1)).squeeze(-1), None
        except RuntimeError:  # a target is no class
            pass
    if looks and not (runs_triton(log_probs) or torch._C._are_functorch_transforms_active()):
        check_target("linear_log_prob", target, classes, ignore_index)
    ignored = target == ignore_index
    known = (target >= 0) & (target < classes) | ignored
    chosen = log_probs.gather(-1, target.clamp(0, classes - 1).unsqueeze(-1)).squeeze(-1)
    chosen = chosen * torch.where(known, 1.0, torch.nan).to(log_probs.dtype)
    return chosen.masked_fill(ignored, 0), ignored


def check_temperature(temperature) -> None:
    """Raise ValueError where it is no number that float32 can divide logits by."""
    if not (isinstance(temperature, (int, float)) and 1e-30 <= temperature <= 1e30):  # a union takes twice as long
        raise ValueError(
            f"linear_log_prob: temperature must be a positive number, from 1e-30 to 1e30; got {temperature!r}"
        )


def linear_log_prob_plain(
    input, linear_weight, target, *, linear_bias=None, temperature=1.0, return_entropy=False, ignore_index=-100
):
    """The same through torch's own operators, logits in memory."""
    logits = wide_logits(input, linear_weight, linear_bias)
    logits = logits if temperature == 1 else logits / temperature
    log_probs = logits.log_softmax(-1)
    chosen, ignored = _chosen(log_probs, target, -100 if ignore_index is None else ignore_index)
    if not return_entropy:
        return chosen
    finite = log_probs.masked_fill(log_probs < LEAST, 0)  # 0 log 0 = 0
    entropy = -(log_probs.exp() * finite).sum(dim=-1)
    return chosen, entropy if ignored is None else entropy.masked_fill(ignored, 0)
