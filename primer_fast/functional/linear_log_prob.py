"""Differentiable log-probability of a target under a linear layer's softmax: checks here, math in kernels/."""

import math
from typing import Literal, overload

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


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, x, w, b, target, temperature):  # x (..., D), w (V, D), b (V,), target (...)
        y, lse, entropy, kept = run(x, w, b, target)
        ctx.save_for_backward(x, w, b, target, lse, entropy, kept)
        ctx.temperature = temperature
        return y, entropy

    @staticmethod
    def backward(ctx, dy, dentropy):  # (...) each
        x, w, b, target, lse, entropy, kept = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:4]
        if differentiates(dy, dentropy):
            grads = _differentiable_grads(x, w, b, target, ctx.temperature, dy, dentropy, needed)
        else:
            grads = library.linear_log_prob.gradients(
                dy, dentropy, x, w, b, target, lse, entropy, ctx.temperature, needed, kept
            )
        return None, *grads, None, None


_apply = apply_of(_LinearLogProb)


def _differentiable_grads(x, w, b, target, temperature, dy, dentropy, needed):
    entropy = dentropy is not None

    def plain():
        return linear_log_prob_plain(x, w, target, linear_bias=b, temperature=temperature, return_entropy=entropy)

    return gradients_of(plain, (x, w, b), needed, (dy, dentropy) if entropy else dy)


@overload
def linear_log_prob(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None,
    temperature: float = 1.0, return_entropy: Literal[False] = False, keep_logits: bool = False,
) -> Tensor: ...  # fmt: skip
@overload
def linear_log_prob(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None,
    temperature: float = 1.0, return_entropy: Literal[True], keep_logits: bool = False,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def linear_log_prob(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None,
    temperature: float = 1.0, return_entropy: bool, keep_logits: bool = False,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def linear_log_prob(
    input: Tensor,  # (..., D)
    linear_weight: Tensor,  # (V, D)
    target: Tensor,  # (...) int64
    *,
    linear_bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    return_entropy: bool = False,
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
        target: a class for each row. Outside [0, V) the row's log-probability is NaN, and so are its gradients.
        temperature: divides the logits, bias included.
        return_entropy: return also the entropy of each row's softmax, where 0 log 0 = 0.
        keep_logits: on a GPU, where a gradient will be wanted, keep the logits from the forward to the backward instead
            of making them twice: three products in place of four, for N V elements of the input's dtype, 2.1 GB at 8192
            rows and 131,072 classes in 16 bits. Results and gradients are then those of logits rounded to that dtype.
            The backward may run more than once. Elsewhere it changes nothing.

    Raises:
        ValueError: the shapes or devices do not match, or ``temperature`` is not a positive number.
        TypeError: an argument is not a tensor, the dtypes differ, or ``target`` is not int64.

    Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models" (2024), for the logits that are not
    in memory; PPO's and DPO's objectives are made of these log-probabilities.
    """
    dtype = autocast_dtype(input) if isinstance(input, Tensor) else None
    if dtype is not None:
        input, linear_weight, linear_bias = autocast_to(dtype, input, linear_weight, linear_bias)
    tensors = input, linear_weight, linear_bias, target
    if prepares(input):
        keep = keep_logits and wants_gradient(*tensors)
        precision = torch.get_float32_matmul_precision()
        plan = library.linear_log_prob.known(*tensors, temperature, return_entropy, keep, precision)
        if plan is not None:
            return _run(plan, tensors, temperature, return_entropy)
    check_temperature(temperature)
    if not jit_traces():
        check("linear_log_prob", input, linear_weight, target, linear_bias)
    if plain_is_best(input, linear_weight, target):
        return linear_log_prob_plain(
            input, linear_weight, target,
            linear_bias=linear_bias, temperature=temperature, return_entropy=return_entropy,
        )  # fmt: skip
    if sharded(*tensors):
        from primer_fast.functional import shards

        def run_local(x, w, b, t):
            return linear_log_prob(
                x, w, t, linear_bias=b, temperature=temperature, return_entropy=return_entropy, keep_logits=keep_logits
            )  # fmt: skip

        results = shards.loss_rows("linear_log_prob", run_local, *tensors, 1 + return_entropy)
        return results if return_entropy else results[0]
    keep = keep_logits and wants_gradient(*tensors)
    if not needs_operator(*tensors):
        told = temperature, return_entropy, keep
        run = lambda x, w, b, t: library.linear_log_prob.forward(x, w, b, t, *told)  # noqa: E731
        return _run(run, tensors, temperature, return_entropy)
    x, flat_target, bias = library.logits.rows_of(input, target, linear_bias)
    arguments = x, linear_weight, bias, flat_target, float(temperature), return_entropy
    if keep and runs_triton(x):
        y, _, entropy, _ = library.linear_log_prob.linear_log_prob_kept(*arguments)
    else:
        y, _, entropy = library.linear_log_prob.linear_log_prob(*arguments)
    y = y.view(target.shape)
    return (y, entropy.view(target.shape)) if return_entropy else y


def _run(run, tensors, temperature, return_entropy):
    if wants_gradient(*tensors):
        y, entropy = _apply(run, *tensors, temperature)
    else:
        y, _, entropy, _ = run(*tensors)
    return (y, entropy) if return_entropy else y


def _chosen(log_probs, target):  # (..., V), (...) -> (...)
    if target.is_cpu and type(log_probs) is Tensor and not (torch.compiler.is_compiling() or jit_traces()):
        try:
            return log_probs.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        except RuntimeError:  # a target is no class
            pass
    known = (target >= 0) & (target < log_probs.shape[-1])
    index = target.clamp(0, log_probs.shape[-1] - 1).unsqueeze(-1)
    return log_probs.gather(-1, index).squeeze(-1) * torch.where(known, 1.0, torch.nan).to(log_probs.dtype)


def check_temperature(temperature) -> None:
    """Raise ValueError where it is no positive number."""
    if not (isinstance(temperature, (int, float)) and 0 < temperature < math.inf):  # a union takes twice as long
        raise ValueError(f"linear_log_prob: temperature must be a positive number; got {temperature!r}")


def linear_log_prob_plain(input, linear_weight, target, *, linear_bias=None, temperature=1.0, return_entropy=False):
    """The same through torch's own operators, logits in memory."""
    logits = torch_F.linear(input, linear_weight, linear_bias)
    if logits.dtype is not torch.float32 and logits.dtype is not torch.float64:
        logits = logits.float()
    logits = logits if temperature == 1 else logits / temperature
    log_probs = logits.log_softmax(-1)
    chosen = _chosen(log_probs, target)
    if not return_entropy:
        return chosen
    finite = log_probs.masked_fill(log_probs == -torch.inf, 0)  # 0 log 0 = 0
    return chosen, -(log_probs.exp() * finite).sum(dim=-1)
