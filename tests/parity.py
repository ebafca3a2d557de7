"""A model that was changed against the same model before: outputs and gradients, judged by float64."""

import copy

import pytest
import torch

import primer_fast
from primer_fast import nn
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


def varied(model, much):
    """The model with noise of size ``much`` on every parameter: norms and biases begin as exactly 1 and 0."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=much)
    return model


def padded(side, lengths, ids):
    """Random tokens, a row for each length, and which are real: the others pad the rows on one ``side``.

    ids: the first token and the one after the last. The first length must be the largest.
    """
    torch.manual_seed(2)
    tokens, mask = torch.randint(*ids, (len(lengths), lengths[0])), torch.ones(len(lengths), lengths[0]).bool()
    for row, length in enumerate(lengths):
        mask[row, slice(0, -length) if side == "left" else slice(length, None)] = False
    return tokens, mask


def both(model):
    """The model replaced, as it was before, the report."""
    torch.manual_seed(0)
    before = copy.deepcopy(varied(model, 0.1))
    return model, before, primer_fast.replace_modules(model)


def fused(model, x):
    """Names of the activations that the functions were asked to compute along."""
    names, linear = [], nn.linear.F.linear
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            nn.linear.F, "linear", lambda *a, activation: names.append(activation) or linear(*a, activation=activation)
        )
        model(x)
    return names


class OneStatement(torch.nn.Module):
    """A chain of calls, in one statement."""

    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = torch.nn.Linear(6, 8), torch.nn.SiLU(), torch.nn.Linear(8, 6)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))
