"""The benchmark of launchers: which calls it makes, what it counts, and that it leaves no trace."""

import json

import pytest
from compiled_rows import run_python

from primer_fast.bench import launchers
from primer_fast.bench import op as ops
from primer_fast.bench.goals import BOTH_WAYS, FORWARD
from primer_fast.bench.op import EAGER, OURS
from primer_fast.bench.timing import Timing

pytestmark = pytest.mark.xdist_group("offline")

PROBE = """
import json, torch, triton
from primer_fast import backend
from primer_fast.bench import launchers
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
        found.setdefault((name, setting.split(",")[0]), []).append(provider)
    step = ("launch of GPT-2's step", "the sum of its calls")
    assert found.pop(step) == [OURS, launchers.BARE, launchers.AUTOGRAD]
    assert set(found) == {(f"launch of {op}", way) for op in ops.names() for way in ("forward", "both ways")}
    for (_, way), providers in found.items():
        assert providers == [OURS, launchers.BARE, EAGER if way == "forward" else launchers.AUTOGRAD]


def test_a_call_is_judged_in_bare_launches():
    timings = {OURS: Timing((0.010, 0.012, 0.011)), launchers.BARE: Timing((0.005, 0.004, 0.002))}
    ours, bare = launchers._trials("launch of linear", "both ways", timings, BOTH_WAYS)
    (target,) = ours.targets
    assert target["value"] == pytest.approx(3.0) and target["met"] and bare.targets == []
    slower = {OURS: Timing((0.090,)), launchers.BARE: Timing((0.010,))}
    for goal in (FORWARD, BOTH_WAYS):
        assert not launchers._trials("a", "b", slower, goal)[0].targets[0]["met"]


def test_gpt2_calls_are_of_measured_ops():
    assert set(launchers.GPT2_CALLS) < set(ops.names())
    assert launchers.GPT2_CALLS["linear"] == 4 * launchers.GPT2_CALLS["scaled_dot_product_attention"]
