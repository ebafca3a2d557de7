"""The benchmark of launchers: which calls it makes, what it counts, and that it leaves no trace."""

import json

import pytest
import torch
from compiled_rows import run_python

from primer_fast.bench import launchers
from primer_fast.bench import op as ops
from primer_fast.bench.goals import BOTH_WAYS, FORWARD
from primer_fast.bench.op import EAGER, OURS
from primer_fast.bench.timing import Timing

pytestmark = pytest.mark.xdist_group("offline")

PROBE = """
import gc, json, torch, triton
from primer_fast import backend
from primer_fast.bench import launchers
gc.freeze()  # each timing begins with a collection
before = triton.runtime.driver._active, backend.stand_in, torch.get_num_threads()
trials = launchers.launchers("cpu", 0.01, False, small=True)
after = triton.runtime.driver._active, backend.stand_in, torch.get_num_threads()
print(json.dumps({"same": before == after, "trials": [(t.name, t.setting, t.provider, t.median_ms) for t in trials]}))
"""


def test_every_op_is_called_both_ways():
    done = run_python("-c", PROBE)
    assert done.returncode == 0, done.stderr[-4000:]
    seen = json.loads(done.stdout)
    assert seen["same"]
    found = {}
    for name, setting, provider, ms in seen["trials"]:
        assert ms > 0
        found.setdefault((name, setting.removesuffix(", host time up to the driver")), []).append(provider)
    step = ("launch of GPT-2's step", "the sum of its calls, both ways")
    assert found.pop(step) == [OURS, launchers.BARE, launchers.AUTOGRAD]
    ways = ("forward", "both ways", "both ways, of 8 in one backward")
    assert set(found) == {(f"launch of {op}", way) for op in ops.names() for way in ways}
    for (_, way), providers in found.items():
        assert providers == [OURS, launchers.BARE, EAGER if way == "forward" else launchers.AUTOGRAD]


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
