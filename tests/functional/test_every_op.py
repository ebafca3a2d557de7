"""What holds for every op alike: its reference, its gradients of gradients, and that two runs are bitwise equal."""

import contextlib
import importlib
import math

import numpy as np
import pytest
import torch
from functional.catalogue import DERIVATIVES, LONG_SUMS
from operators.samples import SAMPLES, results
from torch.nn.attention import SDPBackend, sdpa_kernel

from primer_fast.proof import verify
from primer_fast.reference.case import arguments
from primer_fast.reference.ops import OPS

SOME_WAYS = not torch.cuda.is_available()  # `primer-fast verify` takes all in the interpreter too


def units():
    """Every case in every dtype. In the interpreter each takes one of the ways to load operands, by turns.

    `make quick` takes bfloat16 alone.
    """
    chosen = {}
    for unit in verify.cases_to_verify():
        chosen.setdefault((unit.op, unit.case.name, unit.dtype), []).append(unit)
    for turn, ways in enumerate(chosen.values()):
        for unit in ways[turn % len(ways) :][:1] if SOME_WAYS else ways:
            yield pytest.param(unit, marks=() if unit.dtype == torch.bfloat16 else pytest.mark.slow)


@pytest.mark.parametrize("unit", list(units()), ids=lambda unit: str(unit).replace(" ", "-"))
def test_matches_reference(unit):
    rows = verify.check(*unit)
    assert {row.tensor for row in rows} >= {"output", *OPS[unit.op].differentiable(unit.case)}
    assert unit.op != "linear_log_prob" or ("entropy" in {r.tensor for r in rows}) == (
        unit.case.options.get("return_entropy", False)
    )
    assert [row for row in rows if not row.passed] == []
    assert all(math.isfinite(row.budget) for row in rows)


@pytest.mark.parametrize("op", verify.ops())
def test_reference_is_pytorch_in_float64(op):
    for case in verify.cases(op, native=False):
        for row in verify.check(op, case, torch.float64):
            assert row.error < 1e-9, (case.name, row)


@pytest.mark.parametrize("op, shapes, options", DERIVATIVES, ids=str)
def test_reference_gradient_is_the_derivative(op, shapes, options):
    """Along a random direction, by central differences in float64."""
    module = importlib.import_module(f"primer_fast.reference.{op}")
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    steps = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    if "padding_idx" in options:
        steps["weight"][options["padding_idx"]] = 0  # its gradient is left out, not its value
    forward, h = getattr(module, op), 1e-6

    def outputs(sign):
        moved = {name: a + sign * h * steps[name] for name, a in arrays.items()}
        y = forward(**arguments(moved), **{k: v for k, v in options.items() if k != "padding_idx"})
        return y if isinstance(y, tuple) else (y,)

    ahead, behind = outputs(1), outputs(-1)
    upstream = tuple(rng.normal(size=np.shape(y)) for y in ahead)
    numeric = sum((dy * (a - b)).sum() for dy, a, b in zip(upstream, ahead, behind, strict=True)) / (2 * h)
    grads = getattr(module, f"{op}_grad")(
        upstream if len(upstream) > 1 else upstream[0], **arguments(arrays), **options
    )
    np.testing.assert_allclose(numeric, sum((grads[name] * steps[name]).sum() for name in shapes), rtol=1e-6)


@pytest.mark.parametrize("name", LONG_SUMS)
def test_two_runs_are_bitwise_equal(name, device):
    """Where sums are long enough to be shared out among programs."""
    call, make = LONG_SUMS[name]
    tensors = make(device)
    leaves = [t for t in tensors if t.requires_grad]

    def run():
        torch.manual_seed(1)
        outputs = results(call(*tensors))
        return *outputs, *torch.autograd.grad(outputs, leaves, [torch.randn_like(y) for y in outputs])

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def in_float32(sample, device):
    torch.manual_seed(0)
    return [
        t.detach().float().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in sample.make(device)
    ]


# PyTorch's operators draw another dropout
WITH_GRADIENTS = [s for s in SAMPLES if s.why not in ("no gradient", "decoding", "no tokens", "dropout")]


@pytest.mark.parametrize("sample", WITH_GRADIENTS, ids=str)
def test_an_expanded_upstream_gradient(sample, device, request):
    """sum() sends back one element with stride 0."""

    def gradients(place):
        tensors = in_float32(sample, place)
        leaves = [t for t in tensors if t.requires_grad]
        torch.manual_seed(1)
        return torch.autograd.grad(sum(y.sum() for y in results(sample.call(*tensors)) if y.requires_grad), leaves)

    got = gradients(device)
    request.getfixturevalue("plain_path")
    for g, w in zip(got, gradients("cpu"), strict=True):
        torch.testing.assert_close(g.cpu(), w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sample", WITH_GRADIENTS, ids=str)
def test_second_derivative(sample, device, request):
    """The gradient of a penalty on all first gradients, on the kernels and on PyTorch's operators."""

    def penalty(place):
        tensors = in_float32(sample, place)
        leaves = [t for t in tensors if t.requires_grad]
        value = sum(y.pow(3).sum() for y in results(sample.call(*tensors)) if y.requires_grad)
        first = torch.autograd.grad(value, leaves, create_graph=True)
        total = value + sum(g.square().sum() for g in first)
        return torch.autograd.grad(total, leaves)

    got = penalty(device)
    request.getfixturevalue("plain_path")
    attention = sample.op == "scaled_dot_product_attention"
    with sdpa_kernel(SDPBackend.MATH) if attention else contextlib.nullcontext():
        want = penalty("cpu")
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(
            g.cpu(), w, rtol=1e-3, atol=1e-3 * max(1.0, w.abs().max().item() if w.numel() else 1)
        )
