"""What holds for every op alike: its reference, upstream gradients without memory, that two runs are bitwise equal."""

import math

import pytest
import torch
from catalogue import LONG_SUMS, SAMPLES, results

from primer_fast.proof import verify
from primer_fast.reference.ops import OPS

SOME_WAYS = not torch.cuda.is_available()  # `primer-fast verify` takes all in the interpreter too


def units():
    """Every case in every dtype and on every way to load operands.

    In the interpreter a case is checked twice: in float32 and in one of the 16-bit dtypes, each on one of the ways, by
    turns. `make quick` takes the 16-bit one alone.
    """
    chosen = {}
    for unit in verify.cases_to_verify():
        chosen.setdefault((unit.op, unit.case.name), {}).setdefault(unit.dtype, []).append(unit)
    for turn, ways_of in enumerate(chosen.values()):
        left_out = (torch.float16, torch.bfloat16)[turn % 2] if SOME_WAYS else None
        for i, (dtype, ways) in enumerate(ways_of.items()):
            for unit in ways[(turn // 2 + i) % len(ways) :][:1] if SOME_WAYS else ways:
                if dtype != left_out:
                    yield pytest.param(unit, marks=pytest.mark.slow if dtype == torch.float32 else ())


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
    """Its gradients too."""
    for case in verify.cases(op, native=False):
        for row in verify.check(op, case, torch.float64):
            assert row.error < 1e-9, (case.name, row)


@pytest.mark.parametrize("sample", LONG_SUMS, ids=str)
def test_two_runs_are_bitwise_equal(sample, device):
    """Where sums are long enough to be shared out among programs."""
    tensors = sample.make(device)
    leaves = [t for t in tensors if t.requires_grad]

    def run():
        torch.manual_seed(1)
        outputs = results(sample.call(*tensors))
        return *outputs, *torch.autograd.grad(outputs, leaves, [torch.randn_like(y) for y in outputs])

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


# PyTorch's operators draw another dropout
WITH_GRADIENTS = [s for s in SAMPLES if s.why not in ("no gradient", "decoding", "no tokens", "dropout")]


@pytest.mark.parametrize("sample", WITH_GRADIENTS, ids=str)
def test_an_expanded_upstream_gradient(sample, device, request):
    """sum() sends back one element with stride 0."""

    def gradients(place):
        tensors = sample.make(place, torch.float32)
        outputs = [y.sum() for y in results(sample.call(*tensors)) if y.requires_grad]
        return torch.autograd.grad(sum(outputs), [t for t in tensors if t.requires_grad])

    got = gradients(device)
    request.getfixturevalue("plain_path")
    for g, w in zip(got, gradients("cpu"), strict=True):
        torch.testing.assert_close(g.cpu(), w, rtol=1e-4, atol=1e-4)
