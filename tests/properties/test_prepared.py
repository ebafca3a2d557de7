"""Prepared launchers give what they give unprepared, bit for bit, whatever sequence of calls came before."""

import random

import pytest
import torch
from catalogue import SAMPLES, run

from primer_fast import functional as F
from primer_fast.kernels import tunable
from primer_fast.kernels.device import assume_chip, forget_chip
from primer_fast.kernels.launch import prepared

LAYOUTS = ("contiguous", "permuted", "sliced", "offset")
FLOATS = (torch.float32, torch.bfloat16)


def placed(t, layout):
    """The same numbers: contiguous, with an axis of its own order, behind a gap, or off their 16 bytes."""
    if layout == "permuted":
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        return t.new_zeros(*t.shape[:-1], 2 * t.shape[-1])[..., ::2].copy_(t)
    if layout == "offset":
        return t.new_zeros(t.numel() + 3)[3:].view(t.shape).copy_(t)
    return t.contiguous()


OPS = sorted({sample.op for sample in SAMPLES})


def kinds_of(op, rng):
    """Nine kinds of call that differ in one thing: three samples, each also with another layout, and another dtype."""
    samples = [s for s in SAMPLES if s.op == op and s.why not in ("decoding", "no gradient")]
    for sample in rng.sample(samples, 3):
        layouts, dtypes = rng.sample(LAYOUTS, 2), rng.sample(FLOATS, 2)
        yield from ((sample, layouts[0], dtypes[0]), (sample, layouts[1], dtypes[0]), (sample, layouts[0], dtypes[1]))


def run_sequence(op, device):
    """Calls of these kinds, each four times with other numbers, in any order: their results and gradients."""
    rng, found = random.Random(op), []
    torch.manual_seed(0)
    calls = [*kinds_of(op, rng)] * 4
    rng.shuffle(calls)
    for sample, layout, dtype in calls:
        tensors = sample.make(device, dtype, seed=rng.randrange(2**31))
        others, floats = tensors[: len(sample.whole)], tensors[len(sample.whole) :]
        wanted = rng.random() < 0.8
        found += run(sample.call, [*others, *(placed(t.detach(), layout).requires_grad_(wanted) for t in floats)])
    return [t.detach().clone() for t in found]


@pytest.mark.parametrize("op", OPS)
def test_sequences_of_calls(op, device):
    got = run_sequence(op, device)
    assert sum(len(function.plans) for function in prepared._functions) > 1
    with prepared.unprepared():
        prepared.forget()
        want = run_sequence(op, device)
    assert len(got) == len(want) > 36
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def plans():
    return sum(len(function.plans) for function in prepared._functions)


def calls(device, times=3):
    x, w = torch.ones(3, 8, device=device), torch.ones(5, 8, device=device)
    for _ in range(times):
        F.linear(x, w)


def test_the_second_call_of_a_kind_makes_its_plan(device):
    for times in (1, 2, 3):
        calls(device, 1)
        assert plans() == (times > 1)


@pytest.mark.parametrize("change", [forget_chip, tunable.forget_tuned, prepared.forget])
def test_what_settings_rest_on_takes_the_plans_along(change, device):
    calls(device)
    assert plans() == 1
    change()
    assert plans() == 0


def test_an_assumed_chip_has_plans_of_its_own(device):
    calls(device)
    with assume_chip("sm_80"):
        assert plans() == 0
        calls(device)
        assert plans() == 1
    assert plans() == 0


def test_whoever_watches_settings_is_asked_at_every_call(device):
    asked = []
    with tunable.watching(lambda choice, gpu, problem: asked.append(choice.name) or choice.chosen(gpu, problem)):
        calls(device, 4)
    assert asked.count("matmul") == 4 and plans() == 0


def test_numbers_in_a_decision_forbid_a_plan(device):
    """A function that looks at what a tensor holds runs as it is."""

    @prepared.prepared(1)
    def looks(x):
        return x + 1 if x.sum() > 0 else x - 1

    x = torch.ones(3, device=device)
    assert [looks(sign * x)[0].item() for sign in (1, 1, 1, -1)] == [2, 2, 2, -2]


def test_an_argument_that_is_returned_is_the_one_of_the_call(device):
    @prepared.prepared(2)
    def both(x, y):
        return y, (x, None), x[1:]

    for same in (True, True, True, False, False):  # recorded where both arguments are one tensor
        x = torch.rand(3, device=device)
        y = x if same else torch.rand(3, device=device)
        a, (b, none), part = both(x, y)
        assert a is y and b is x and none is None and torch.equal(part, x[1:])


def test_parts_of_new_memory(device):
    """They are views of the whole memory, where an operator of torch's wrote to it and where none did."""

    @prepared.prepared(1)
    def parts(x):
        y, unwritten = x.new_empty(2, 3), x.new_empty(2, 3)
        y.copy_(x)
        return y[1:], y.T, unwritten[1:]

    for _ in range(4):
        x = torch.rand(2, 3, device=device)
        last, turned, unwritten = parts(x)
        assert torch.equal(last, x[1:]) and torch.equal(turned, x.T)
        assert (*unwritten.shape, unwritten.storage_offset(), unwritten.untyped_storage().nbytes()) == (1, 3, 3, 24)


def test_options_outside_a_plan_are_checked(device):
    """Grouped heads run by the plan of a call that allowed them, and are refused where they are not allowed."""
    q, k = torch.ones(1, 4, 3, 8, device=device), torch.ones(1, 2, 3, 8, device=device)
    for _ in range(4):
        F.scaled_dot_product_attention(q, k, k, enable_gqa=True)
        with pytest.raises(ValueError, match="Hk must divide H"):
            F.scaled_dot_product_attention(q, k, k)


def test_a_subclass_has_no_plan(device):
    class Own(torch.Tensor):
        pass

    x = torch.ones(3, 8, device=device).as_subclass(Own)
    for _ in range(4):
        assert type(F.linear(x, torch.ones(5, 8, device=device))) is Own
    assert not any(Own in key[1] for function in prepared._functions for key in function.plans)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a capture needs a GPU")
def test_plans_are_captured():
    x, w = torch.randn(64, 128, device="cuda"), torch.randn(256, 128, device="cuda")
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            F.linear(x, w, activation="gelu")
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        y = F.linear(x, w, activation="gelu")
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, F.linear(x, w, activation="gelu"))
