"""A model that was changed against the same model before: outputs and gradients, judged by float64."""

import copy

import torch

from primer_fast.proof.numerics import budget, exact, worst


def run(model, call, dy):
    """-> output, gradients of all parameters"""
    model.zero_grad()
    y = call(model)
    y.backward(dy.to(y.dtype))
    return y, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_as_before(changed, before, call):
    """``call(model)`` is a floating tensor. before: as it was, of the same dtype."""
    truth = copy.deepcopy(before).double()
    dtype = next(before.parameters()).dtype
    dy = torch.randn_like(call(before))
    (got, got_grads), (plain, plain_grads), (want, want_grads) = (
        run(m, call, dy) for m in (changed, before, truth)
    )  # fmt: skip
    assert got.dtype == plain.dtype and got.shape == plain.shape
    assert want.std() > 1e-2, "an output that says nothing"
    _within(dtype, "output", got, plain, want, want.abs().max().item())
    assert got_grads.keys() == plain_grads.keys() and got_grads
    largest = max(g.abs().max().item() for g in want_grads.values())
    for name, grad in got_grads.items():
        _within(dtype, name, grad, plain_grads[name], want_grads[name], largest)


def _within(dtype, name, got, plain, want, largest):
    """largest: rounding where terms cancel, as in the gradients of attention's key biases, is relative to it."""
    want = exact(want)
    allowed = budget(dtype, worst(exact(plain), want), want) + torch.finfo(dtype).eps * largest
    error = worst(exact(got), want)
    assert error <= allowed, f"{name}: {error:.3g} > {allowed:.3g}"
