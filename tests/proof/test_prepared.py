"""Plans launch what launchers do, for GPUs that are not there: see prepared_probe.py."""

import json

import pytest
from compiled_rows import run_python

pytestmark = pytest.mark.xdist_group("offline")


@pytest.fixture(scope="module")
def seen():
    done = run_python("tests/proof/prepared_probe.py")
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("op", ["linear", "conv2d", "attention", "layer_norm", "cross_entropy"])
def test_sequences_launch_the_same(seen, op):
    """Kernels, grids and arguments of calls whose shapes, strides, alignments and dtypes change."""
    found = seen["sequences"][op]
    assert found["same"] and found["launches"] >= 32 and found["plans"] >= 2


EXPECTED = {
    "limit": 2,  # the oldest plan makes room
    "kept": True,  # a plan keeps its kernel
    "imported": False,  # torch._dynamo, which takes a second or two, and which torch would import for a recording
    "meta": {"launches": [1, 1], "plans": 1},  # tensors without memory
    "second GPU": {"devices": [1] * 5, "plans": 2, "entered": 3},  # becomes the current one for a launch, by a plan too
    "outside": True,  # the stub leaves no trace
}


@pytest.mark.parametrize("what", EXPECTED)
def test_what_plans_heed(what, seen):
    assert seen[what] == EXPECTED[what]


def test_a_hook_gets_what_triton_gives_it(seen):
    assert seen["hooks"] == {"usual": True, "hook": True, "metadata": True, "after": True}


def test_another_driver_has_other_plans(seen):
    found = seen["drivers"]
    assert found["before"] > 0 and found["another kernel"] and found["after"] == 0


def test_threads_share_plans_that_are_forgotten_meanwhile(seen):
    found = seen["threads"]
    assert found["failed"] == [] and found["launches"] == found["calls"] > 0
