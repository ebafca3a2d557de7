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


def test_a_hook_gets_what_triton_gives_it(seen):
    assert seen["hooks"] == {"usual": True, "hook": True, "metadata": True, "after": True}


def test_another_driver_has_other_plans(seen):
    found = seen["drivers"]
    assert found["before"] > 0 and found["another kernel"] and found["after"] == 0


def test_the_oldest_plan_makes_room(seen):
    assert seen["limit"] == 2


def test_a_plan_keeps_its_kernel(seen):
    assert seen["kept"]


def test_threads_share_plans_that_are_forgotten_meanwhile(seen):
    found = seen["threads"]
    assert found["failed"] == [] and found["launches"] == found["calls"] > 0


def test_calls_do_not_import_a_compiler(seen):
    """torch._dynamo takes a second or two, and torch would import it for a recording."""
    assert seen["imported"] is False


def test_tensors_without_memory(seen):
    assert seen["meta"] == {"launches": [1, 1], "plans": 1}


def test_tensors_of_the_second_gpu(seen):
    """It becomes the current one for the launch, by a plan too."""
    assert seen["second GPU"] == {"devices": [1] * 5, "plans": 2, "entered": 3}


def test_the_stub_leaves_no_trace(seen):
    assert seen["outside"]
