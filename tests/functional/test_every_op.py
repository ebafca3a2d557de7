"""What holds for every op alike: its reference, upstream gradients without memory, that two runs are bitwise equal."""

import math

import pytest
import torch
from catalogue import LONG_SUMS, SAMPLES, Sample, channels_last, results

from primer_fast.functional.activation import ACTIVATIONS
from primer_fast.kernels.activation import keeps_derivative
from primer_fast.proof import verify
from primer_fast.proof.numerics import exact, worst
from primer_fast.reference.ops import OPS

SOME_WAYS = not torch.cuda.is_available()  # `primer-fast verify` takes all in the interpreter too


def units():
    """Every case in every dtype and on every way to load operands.

    In the interpreter a case is checked twice: in float32 and in one of the 16-bit dtypes, each on one of the ways, by
    turns; and one gradient, by turns, is asked for alone. `make quick` takes the 16-bit one alone.
    """
    chosen = {}
    for unit in verify.cases_to_verify():
        chosen.setdefault((unit.op, unit.case.name), {}).setdefault(unit.dtype, []).append(unit)
    for turn, ways_of in enumerate(chosen.values()):
        left_out = (torch.float16, torch.bfloat16)[turn % 2] if SOME_WAYS else None
        for i, (dtype, ways) in enumerate(ways_of.items()):
            for unit in ways[(turn // 2 + i) % len(ways) :][:1] if SOME_WAYS else ways:
                if dtype != left_out:
                    alone = OPS[unit.op].differentiable(unit.case) if dtype == torch.float32 else ()
                    alone = alone[turn % len(alone) :][:1] if SOME_WAYS and alone else alone
                    marks = pytest.mark.slow if dtype == torch.float32 else ()
                    yield pytest.param(unit, alone, marks=marks, id=str(unit).replace(" ", "-"))


@pytest.mark.parametrize("unit, alone", list(units()))
def test_matches_reference(unit, alone):
    rows = verify.check(*unit, alone)
    assert {row.tensor for row in rows} >= {"output", *OPS[unit.op].differentiable(unit.case)}
    assert unit.op != "linear_log_prob" or ("entropy" in {r.tensor for r in rows}) == (
        unit.case.options.get("return_entropy", False)
    )
    assert [row for row in rows if not row.passed] == []
    assert all(math.isfinite(row.budget) for row in rows)


@pytest.mark.parametrize("op", verify.ops())
def test_reference_is_pytorch_in_float64(op):
    """The gradients of the reference are compared as well."""
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

    torch.testing.assert_close(run(), run(), rtol=0, atol=0)


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
    torch.testing.assert_close(got, gradients("cpu"), check_device=False, rtol=1e-4, atol=1e-4)


PRODUCTS = {  # of 128 or 256 terms of size 1
    "linear": {"input": (64, 256), "weight": (64, 256)},
    "conv2d": {"input": (1, 64, 4, 4), "weight": (16, 64, 2, 2)},
    "scaled_dot_product_attention": dict.fromkeys(("query", "key", "value"), (1, 1, 64, 128)),
}


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("op", PRODUCTS)
def test_float32_precision_follows_torch(op, precision, device):
    """TF32 keeps 10 bits of each factor, float32 keeps 23."""
    sample = Sample(op, "wide", PRODUCTS[op])
    tensors, before = sample.make(device), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        error = worst(exact(sample.call(*tensors)), OPS[op].function(*map(exact, tensors)))
    finally:
        torch.set_float32_matmul_precision(before)
    limit = 1e-5 if op == "scaled_dot_product_attention" else 1e-4
    assert error < limit if precision == "highest" else limit < error < 0.1


def kept(call, tensors):
    """How many elements of its own a call keeps for the backward, besides its arguments and results."""
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        outputs = results(call(*tensors))
    given = {t.data_ptr() for t in (*tensors, *outputs)}
    return sum(t.numel() for pointer, t in saved.items() if pointer not in given)


ROWS, IMAGE, TABLES = {"input": (8, 16), "weight": (32, 16)}, (2, 3, 5, 4), {"weight": (7, 8), "position": (6, 8)}
KEPT = [
    *((Sample("linear", f"{a}", ROWS, {"activation": a}), 256 * keeps_derivative(a)) for a in (None, *ACTIVATIONS)),
    *(
        (Sample("conv2d", f"{n} x {n}, {a}", {"input": IMAGE, "weight": (4, 3, n, n)}, {"activation": a}, arrange=last),
         2 * 4 * (6 - n) * (5 - n) * keeps_derivative(a))
        for a in (None, *ACTIVATIONS) for n, last in ((2, None), (1, channels_last))
    ),
    (Sample("layer_norm", "two numbers a row", {"input": (8, 64), "weight": (64,)}, {"normalized_shape": 64}), 16),
    (Sample("layer_norm", "and the sum", {"input": (8, 64), "residual": (8, 64)}, {"normalized_shape": 64}), 528),
    (Sample("embedding", "indices", TABLES, {}, {"input": (7, (3, 5))}), 0),
    (Sample("scaled_dot_product_attention", "lse", dict.fromkeys(("query", "key", "value"), (1, 1, 20, 16))), 20),
]  # fmt: skip


@pytest.mark.parametrize("sample, elements", KEPT, ids=str)
def test_what_the_forward_keeps(sample, elements, device):
    """A tensor of the output's size only where an activation's derivative does not follow from the output."""
    tensors = sample.make(device)
    assert kept(sample.call, tensors) == elements
    with torch.no_grad():
        assert kept(sample.call, tensors) == 0
