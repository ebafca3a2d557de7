"""DTensors, as parallelize_module makes them: forward and every gradient are those of one process."""

import json

import pytest
import sharded_cases as cases
from processes import run_processes

pytestmark = pytest.mark.xdist_group("sharded")
# Of the losses, torch's own operators on a CPU refuse rows that the processes cannot share out evenly.
UNEVEN = "linear_cross_entropy, tokens"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two processes found, all cases in one start."""
    folder = tmp_path_factory.mktemp("sharded")
    run_processes(2, cases.__file__, folder, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", [*cases.CASES, "block", "sequence", "compiled", "refused"])
@pytest.mark.parametrize("path", ["kernels", "plain"])
def test_two_processes_are_as_one(path, name, found):
    if (path, name) == ("plain", "compiled"):
        pytest.skip("the kernels' graph says as much")
    differences = [one[f"{path}, {name}"] for one in found]
    if path == "plain" and name == UNEVEN:
        assert all("cannot be evenly sharded" in d for d in differences)
    else:
        assert all(isinstance(d, float) and d < 1e-4 for d in differences), differences


def test_nothing_is_imported_in_vain(found):
    """Before the first DTensor."""
    assert not any(one["imported"] for one in found)
