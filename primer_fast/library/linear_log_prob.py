"""The operators primer_fast::linear_log_prob and linear_log_prob_backward.

linear_log_prob_kept and its backward are the same where the logits are kept for the gradients.
"""

import torch
from torch import Tensor

from primer_fast.backend import has_kernels
from primer_fast.kernels.linear_log_prob import linear_log_prob_bwd, linear_log_prob_fwd
from primer_fast.kernels.logits import Head
from primer_fast.kernels.prepared import prepared
from primer_fast.library.logits import as_they_are, chunked_bwd, chunked_fwd, like_kept, rows_of, sums_dtype
from primer_fast.library.register import absent, only, operator, present, spread


def forward(x, w, b, target, temperature, entropy, ignore_index, keep=False):
    """x (..., D), w (V, D), b (V,) or None, target (...) -> y as target, lse (2, N), entropy as target or None, and the
    logits that the Triton kernels ``keep`` for the gradients, or None.
    """
    if has_kernels(x):
        return _forward(x, w, b, target, temperature, entropy, ignore_index, keep, torch.get_float32_matmul_precision())
    rows, flat, b = rows_of(x, target, b)
    with as_they_are(x):
        y, lse, found = chunked_fwd(rows, w, b, flat, Head(temperature, ignore_index=ignore_index), entropy)
    return y.view(target.shape), lse, found if found is None else found.view(target.shape), None


def gradients(dy, dentropy, x, w, b, target, lse, entropy, temperature, ignore_index, needed, kept=None):
    """dy as target, dentropy likewise or None as entropy -> dx, dw, db, None for each that is not needed."""
    dentropy = None if entropy is None else dentropy
    if has_kernels(x):
        precision = torch.get_float32_matmul_precision()
        own = temperature, ignore_index, tuple(needed), precision
        return _gradients(dy, dentropy, x, w, b, target, lse, entropy, kept, *own)
    rows, flat, b = rows_of(x, target, b)
    dy, dentropy, entropy = map(_flat, (dy, dentropy, entropy))
    head = Head(temperature, ignore_index=ignore_index)
    with as_they_are(x):
        dx, dw, db = chunked_bwd(dy, dentropy, rows, w, b, flat, lse, entropy, head, needed)
    return dx if dx is None else dx.view(x.shape), dw, db


@prepared(4)
def _forward(x, w, b, target, temperature, entropy, ignore_index, keep, precision):
    rows, flat, b = rows_of(x, target, b)
    y, lse, found, kept = linear_log_prob_fwd(
        rows, w, b, flat, float(temperature), entropy, precision, keep=keep, ignore_index=ignore_index
    )  # fmt: skip
    return y.view(target.shape), lse, found if found is None else found.view(target.shape), kept


@prepared(9)
def _gradients(dy, dentropy, x, w, b, target, lse, entropy, kept, temperature, ignore_index, needed, precision):
    rows, flat, b = rows_of(x, target, b)
    dx, dw, db = linear_log_prob_bwd(
        *map(_flat, (dy, dentropy)), rows, w, b, flat, lse, _flat(entropy), float(temperature), needed, precision,
        kept=kept, ignore_index=ignore_index,
    )  # fmt: skip
    return dx if dx is None else dx.view(x.shape), dw, db


known = _forward.known


def _flat(t):
    """One number a row, one after the other; None stays None."""
    return t if t is None else t.reshape(-1).contiguous()


@operator("linear_log_prob")
def linear_log_prob(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor,
    temperature: float, return_entropy: bool, ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y, lse, entropy, _ = forward(input, linear_weight, linear_bias, target, temperature, return_entropy, ignore_index)
    return y, lse, present(entropy, y)


@linear_log_prob.register_fake
def _(input, linear_weight, linear_bias, target, temperature, return_entropy, ignore_index):
    rows = input.shape[0]
    y = input.new_empty(rows, dtype=sums_dtype(input))
    return y, y.new_empty(2, rows), torch.empty_like(y) if return_entropy else absent(y)


@operator("linear_log_prob_backward")
def linear_log_prob_backward(
    dy: Tensor, dentropy: Tensor | None, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None,
    target: Tensor, lse: Tensor, entropy: Tensor | None, temperature: float, ignore_index: int,
    needed: list[bool],
) -> list[Tensor]:  # fmt: skip
    grads = gradients(
        dy, dentropy, input, linear_weight, linear_bias, target, lse, entropy, temperature, ignore_index, needed
    )  # fmt: skip
    return only(grads, needed)


@linear_log_prob_backward.register_fake
def _(dy, dentropy, input, linear_weight, linear_bias, target, lse, entropy, temperature, ignore_index, needed):
    return only([input.new_empty(s) for s in (input.shape, linear_weight.shape, linear_weight.shape[:1])], needed)


def _setup(ctx, inputs, output):
    x, w, b, target, ctx.temperature, return_entropy, ctx.ignore_index = inputs
    _, lse, entropy = output
    ctx.mark_non_differentiable(lse, *(() if return_entropy else (entropy,)))
    ctx.save_for_backward(x, w, b, target, lse, entropy if return_entropy else None)


def _backward(ctx, dy, _, dentropy):
    x, w, b, target, lse, entropy = ctx.saved_tensors
    needed = ctx.needs_input_grad[:3]
    dentropy = None if entropy is None else dentropy
    grads = linear_log_prob_backward(
        dy, dentropy, x, w, b, target, lse, entropy, ctx.temperature, ctx.ignore_index, needed
    )
    return *spread(grads, needed), None, None, None, None


linear_log_prob.register_autograd(_backward, setup_context=_setup)


@operator("linear_log_prob_kept")
def linear_log_prob_kept(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor,
    temperature: float, return_entropy: bool, ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    y, lse, entropy, logits = forward(
        input, linear_weight, linear_bias, target, temperature, return_entropy, ignore_index, keep=True
    )  # fmt: skip
    return y, lse, present(entropy, y), present(logits, y)


@linear_log_prob_kept.register_fake
def _(input, linear_weight, linear_bias, target, temperature, return_entropy, ignore_index):
    rows = input.shape[0]
    y = input.new_empty(rows, dtype=sums_dtype(input))
    entropy = torch.empty_like(y) if return_entropy else absent(y)
    return y, y.new_empty(2, rows), entropy, like_kept(input, linear_weight)


@operator("linear_log_prob_kept_backward")
def linear_log_prob_kept_backward(
    dy: Tensor, dentropy: Tensor | None, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None,
    target: Tensor, lse: Tensor, entropy: Tensor | None, logits: Tensor, temperature: float, ignore_index: int,
    needed: list[bool],
) -> list[Tensor]:  # fmt: skip
    grads = gradients(
        dy, dentropy, input, linear_weight, linear_bias, target, lse, entropy, temperature, ignore_index, needed, logits
    )  # fmt: skip
    return only(grads, needed)


@linear_log_prob_kept_backward.register_fake
def _(dy, dentropy, input, linear_weight, linear_bias, target, lse, entropy, logits, temperature, ignore_index, needed):
    return only([input.new_empty(s) for s in (input.shape, linear_weight.shape, linear_weight.shape[:1])], needed)


def _setup_kept(ctx, inputs, output):
    x, w, b, target, ctx.temperature, return_entropy, ctx.ignore_index = inputs
    _, lse, entropy, logits = output
    ctx.mark_non_differentiable(lse, logits, *(() if return_entropy else (entropy,)))
    ctx.save_for_backward(x, w, b, target, lse, entropy if return_entropy else None, logits)


def _backward_kept(ctx, dy, _, dentropy, __):
    *saved, entropy, logits = ctx.saved_tensors
    needed = ctx.needs_input_grad[:3]
    dentropy = None if entropy is None else dentropy
    grads = linear_log_prob_kept_backward(
        dy, dentropy, *saved, entropy, logits, ctx.temperature, ctx.ignore_index, needed
    )
    return *spread(grads, needed), None, None, None, None


linear_log_prob_kept.register_autograd(_backward_kept, setup_context=_setup_kept)
