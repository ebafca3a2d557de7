"""DTensors, as parallelize_module makes them: forward and every gradient are those of one process."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("sharded_cases.py")
spec = importlib.util.spec_from_file_location("sharded_cases", SCRIPT)
cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cases)
pytestmark = pytest.mark.xdist_group("sharded")
# Of the losses, torch's own operators on a CPU refuse rows that the processes cannot share out evenly.
UNEVEN = "linear_cross_entropy, tokens"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two processes found, all cases in one start."""
    folder = tmp_path_factory.mktemp("sharded")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    common = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    common |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder)], env=common | {"RANK": str(rank)}, stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate()[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)
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
