"""Ways to compute the same: each is right, each is chosen by name, and what is wrong is not timed."""

import itertools

import pytest
import torch

from primer_fast import functional as F
from primer_fast.functional import attention_operator
from primer_fast.kernels import linear, matmul
from primer_fast.kernels.attention import onepass as attention_onepass
from primer_fast.kernels.device import CHIPS, assume_chip
from primer_fast.kernels.prepass import prepass
from primer_fast.kernels.tunable import Variant, watching
from primer_fast.proof import verify
from primer_fast.tuning import session
from primer_fast.tuning.problems import Decision, TunedCase, arrays_of, by_torch, caller
from primer_fast.tuning.replay import Wrong, whole_call

H100 = CHIPS["sm_90"]
UNIT = TunedCase("linear", "primer", "float32")
DECISION = Decision(UNIT, "linear_backward", linear.BackwardProblem(5, 3, 2, 4, 3), backward=True)
FUSED, PREPASS = Variant("fused"), Variant("prepass")
CASES = {case.name: case for case in verify.cases("linear", False)}
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the small cases are the CPU's")


def taking(name, choice):
    """A context in which a choice is for one way, and a list with an entry for each time that it was asked."""
    asked = []

    def watch(asking, gpu, problem):
        if asking is choice and choice.ways[name](gpu, problem):
            asked.append(problem)
            return Variant(name)
        return asking.chosen(gpu, problem)

    return watching(watch), asked


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("below_tile", "bfloat16"), ("many_tiles", "bfloat16"), ("vector", "bfloat16"), ("input_expanded", "float16"),
        ("tall", "float32"), ("leading_axes", "float32"), ("large_values", "float32"),
    ],
)  # fmt: skip
def test_linears_backward_by_a_prepass_matches_the_reference(case, dtype):
    context, asked = taking("prepass", linear.backward_choice)
    with context:
        rows = verify.check("linear", CASES[case], verify.DTYPES[dtype], "descriptors")
    assert asked and [row for row in rows if not row.passed] == []


@pytest.mark.parametrize(("way", "case"), [("pointers", "edges_aligned"), ("descriptors", "below_tile")])
def test_operands_either_way_match_the_reference(way, case):
    context, asked = taking(way, matmul.operands_choice)
    with context:
        rows = verify.check("linear", CASES[case], torch.bfloat16, "descriptors")
    assert len(asked) == 3 and [row for row in rows if not row.passed] == []
    assert all(matmul.operands_choice.default(H100, problem).variant != way for problem in asked)


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_programs_of_the_prepass_walk_down_their_rows(layout, device):
    """Four programs for 21 tiles, the last of which is short, so that each sums several."""
    dy, saved = (torch.randn(661, 40, device=device) for _ in range(2))
    dy = dy if layout == "rows" else dy.T.contiguous().T
    with assume_chip(H100._replace(processors=1)):
        g, sums = prepass(dy, saved, "gelu", torch.float32)
    assert torch.equal(g, dy * saved) and g.is_contiguous()
    torch.testing.assert_close(sums, (dy * saved).sum(0))


def test_the_prepass_is_bitwise_equal_in_two_runs_and_leaves_other_backwards_alone(device):
    x, w, b = (torch.randn(s, device=device, requires_grad=True) for s in ((100, 24), (40, 24), (40,)))
    dy = torch.randn(100, 40, device=device)
    context, asked = taking("prepass", linear.backward_choice)

    def gradients(activation, *leaves):
        return torch.autograd.grad(F.linear(x, w, b, activation=activation), leaves, dy)

    with context:
        for first, second in zip(gradients("gelu", x, w, b), gradients("gelu", x, w, b), strict=True):
            assert torch.equal(first, second)
        assert len(asked) == 2
        asked.clear()
        gradients(None, x, w, b)  # there is no derivative
        y = F.linear(x.detach(), w.detach(), b, activation="gelu")
        torch.autograd.grad(y, b, dy)  # no product needs g: the bias gradient alone
    assert asked == []


@pytest.mark.parametrize("alone", ["input", "weight"])
def test_the_prepass_serves_one_product_alone(alone, device):
    x, w, b = (torch.randn(s, device=device, dtype=torch.bfloat16) for s in ((100, 24), (40, 24), (40,)))
    leaves = (x,) if alone == "input" else (w, b)
    for t in leaves:
        t.requires_grad_()
    dy = torch.randn(100, 40, device=device, dtype=torch.bfloat16)
    gradients = {}
    for way in ("fused", "prepass"):
        context, asked = taking(way, linear.backward_choice)
        with context:
            gradients[way] = torch.autograd.grad(F.linear(x, w, b, activation="gelu"), leaves, dy)
        assert [(problem.input, problem.weight) for problem in asked] == [(alone == "input", alone == "weight")]
    for fused, before in zip(*gradients.values(), strict=True):
        torch.testing.assert_close(fused, before)


def test_the_way_of_attentions_backward_is_asked_for_where_both_are_allowed(device, monkeypatch):
    torch.use_deterministic_algorithms(False)
    tensors = [torch.randn(1, 1, 16, 16, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    launched = []
    launcher = attention_onepass.attention_bwd_onepass
    monkeypatch.setattr(
        attention_operator, "attention_bwd_onepass", lambda *a, **o: launched.append(1) or launcher(*a, **o)
    )
    found = {}
    for fast, way in itertools.product((True, False), ("one-pass", "deterministic")):
        context, asked = taking(way, attention_onepass.backward_choice)
        with context, F.fast_attention_backward(fast):
            out = F.scaled_dot_product_attention(*tensors, is_causal=True)
            out.backward(torch.ones_like(out))
        found[fast, way] = len(asked), len(launched)
        launched.clear()
    assert found == {
        (True, "one-pass"): (1, 1), (True, "deterministic"): (1, 0),
        (False, "one-pass"): (0, 0), (False, "deterministic"): (0, 0),
    }  # fmt: skip


class Clock:
    """Says that the calls it is given take a millisecond each."""

    def __init__(self):
        self.functions = []

    def sampler(self, function):
        self.functions.append(function)
        return lambda: 1.0


def timed(kept, clock):
    return session.time_decision(DECISION, kept, clock, 1e9, lambda: 0.0)


@without_gpu
def test_right_ways_are_timed_whole():
    clock = Clock()
    found = timed([FUSED, PREPASS], clock)
    assert found.settings == FUSED and found.timed == len(clock.functions) == 2 and found.refused == ()
    assert len(clock.functions[1]()) == 4, "the output and three gradients"


@without_gpu
def test_a_wrong_way_is_not_timed(monkeypatch):
    right = linear.prepass
    monkeypatch.setattr(linear, "prepass", lambda *a: tuple(1.01 * t for t in right(*a)))
    clock = Clock()
    found = timed([FUSED, PREPASS], clock)
    assert found.settings == FUSED and found.timed == len(clock.functions) == 1
    (why,) = found.refused
    assert why.startswith("('prepass',): Wrong: result 1 is off by")


@without_gpu
def test_a_wrong_default_does_not_make_others_wrong(monkeypatch):
    """PyTorch's own op says what is right, in a wider dtype."""
    right = linear.prepass
    arrays = arrays_of(UNIT, "cpu")
    want = by_torch(UNIT, arrays)
    assert all(t.dtype == torch.float64 for t in want)
    monkeypatch.setattr(linear, "prepass", lambda *a: tuple(1.01 * t for t in right(*a)))
    with pytest.raises(Wrong, match="result 1"):
        timed([PREPASS, FUSED], Clock())
    assert whole_call(DECISION, FUSED, arrays, want)


@without_gpu
def test_upstream_gradients_are_the_same_for_all_who_are_compared():
    unit = UNIT._replace(precision="bfloat16")
    arrays = arrays_of(unit, "cpu")
    mine, again, theirs = caller(unit, arrays)(), caller(unit, arrays)(), by_torch(unit, arrays)
    assert all(torch.equal(a, b) for a, b in zip(mine, again, strict=True))
    assert [t.dtype for t in theirs] == [torch.float32] * 4
    for a, b in zip(mine, theirs, strict=True):
        assert torch.linalg.vector_norm(a.float() - b) <= 2e-2 * torch.linalg.vector_norm(b)
