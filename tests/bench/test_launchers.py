"""The benchmark of launchers: which calls it makes and what it counts."""

import pytest
import torch

from primer_fast.bench import op as ops
from primer_fast.bench.goals import BOTH_WAYS, FORWARD
from primer_fast.bench.op import OURS
from primer_fast.bench.programs import launchers
from primer_fast.bench.timing import Timing


def test_a_call_is_judged_in_bare_launches():
    timings = {OURS: Timing((0.010, 0.012, 0.011)), launchers.BARE: Timing((0.005, 0.004, 0.002))}
    ours, bare = launchers._rows("launch of linear", "both ways", timings, BOTH_WAYS)
    (target,) = ours.targets
    assert target["value"] == pytest.approx(3.0) and target["met"] and bare.targets == []
    slower = {OURS: Timing((0.090,)), launchers.BARE: Timing((0.010,))}
    for goal in (FORWARD, BOTH_WAYS):
        assert not launchers._rows("a", "b", slower, goal)[0].targets[0]["met"]


def test_gpt2_calls_are_of_measured_ops():
    assert set(launchers.GPT2_CALLS) < set(ops.names())
    assert launchers.GPT2_CALLS["linear"] == 4 * launchers.GPT2_CALLS["scaled_dot_product_attention"]


def test_calls_that_share_a_backward_are_those_of_one():
    """Each of so many calls is made, with tensors of its own, and gets its own gradients."""
    seen = []
    call = launchers.Call(lambda x, w: seen.append((x, w)) or x * w, (torch.ones(2), torch.full((2,), 3.0)))
    ours, autograd = launchers.both_ways(call, 4)
    seen.clear()
    grads, none = ours(), autograd()
    assert len(seen) == 4 and len({id(t) for each in seen for t in each}) == 8
    assert [g.tolist() for g in grads] == [[3, 3], [1, 1]] * 4 and len(none) == 8
    assert Timing((8.0, 4.0), True).of_one(4) == Timing((2.0, 1.0), True)
