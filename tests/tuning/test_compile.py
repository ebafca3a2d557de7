"""Pruning by the compiler itself, and the command without a GPU; in processes of their own, which do not interpret."""

import importlib.util
import json

import pytest
from compiled_rows import run_python

pytestmark = pytest.mark.xdist_group("tuning")  # one process compiles for all of them
FRONT_ENDS = importlib.util.find_spec("tyro") is not None  # which `primer-fast tune` needs


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """Lines of the probe, whose last are those of dry runs that write to a folder, and the folder."""
    folder = tmp_path_factory.mktemp("tuned")
    choice = ["embedding", "--dry-run", "--target", "sm_90", "--minutes", "0", "--jobs", "1", "--out", str(folder)]
    done = run_python("tests/tuning/compile_probe.py", *(choice if FRONT_ENDS else []))
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines(), folder


@pytest.fixture(scope="module")
def seen(printed):
    return json.loads(printed[0][0])


def test_problems_are_one_of_each_bucket(seen):
    assert len(seen["decisions"]) == len(set(seen["decisions"])) and seen["units"] == ["linear", "max_pool2d"]
    assert "matmul 4096x4096x4096 item2 passes1 desc1 vector1 wide1 fused0 double1 count1" in seen["decisions"]
    assert "max_pool2d_backward 262144x64 item2 reads9" in seen["decisions"], "rows are cells, of 2 x 2 pixels"
    assert sum(decision.startswith("max_pool2d") for decision in seen["decisions"]) >= 6


def test_gradients_arrive_in_the_layout_of_the_output(seen):
    """As they do in a network of channels_last: all products can move by descriptors; y and dx are of one bucket."""
    assert [decision.split()[0] for decision in seen["convolution"]] == ["conv2d_gather", "conv2d_weight"]
    assert all("desc1" in decision for decision in seen["convolution"])


def test_processes_compile_and_look_for_problems_where_this_one_interprets(seen):
    assert seen["there"] and seen["registers"][0] > 0


def test_only_what_is_wanted_is_compiled(seen):
    """A linear layer's launches: none where none is wanted, all where the unit is compiled whole."""
    backward = ["activation_prepass_kernel", "add_rows_kernel", "matmul_kernel", "matmul_kernel"]
    assert seen["asked"] == [["matmul_kernel", *backward], 0] and seen["whole"] == 5


def test_a_way_owns_all_launches_on_it(seen):
    """With those of the settings that are asked for on the way; not the forward's product."""
    assert seen["ways"] == {
        "fused": ["matmul_kernel"] * 2,
        "prepass": ["activation_prepass_kernel", "add_rows_kernel", "matmul_kernel", "matmul_kernel"],
    }


def test_the_prepass_and_its_products_do_not_spill(seen):
    error, registers, spilled = seen["prepass"]
    assert error is None and spilled == 0 and registers <= 255


def test_of_three_candidates_the_default_is_left(seen):
    """One of the others spills, the other takes more shared memory than there is."""
    assert seen["errors"][1] is None and seen["registers"][1] == 255
    assert seen["spilled"][0] == 0 and seen["spilled"][1] > 1000
    assert seen["errors"][2].startswith("SharedMemoryExceeded") and seen["kept"] == [seen["default"]]


def test_equal_launches_are_recognised(seen):
    assert seen["equal"]


def test_gpus_beside_the_known_ones_can_be_compiled_for(seen):
    assert seen["known"] and seen["sm_89"] == [89, 101376, 142]


@pytest.mark.skipif(not FRONT_ENDS, reason="`primer-fast tune` needs primer-fast[cli]")
def test_a_dry_run_shows_what_it_would_try(printed):
    """The table has a line for each choice; with no minutes nothing is compiled, and nothing is written."""
    (_, *lines), folder = printed
    half = len(lines) // 2
    assert lines[half] == "0" and lines[: half - 1] == lines[half + 1 : -1], "the same by both names, but for seconds"
    lines = lines[:half]
    assert lines[0].startswith("6 buckets, ") and "0 of 6 problems fit into 0 minutes" in lines[1]
    table = [line.split() for line in lines[3:7]]
    assert [line[0] for line in table] == ["choice", "embedding_backward", "embedding_forward", "all"]
    for name, buckets, candidates, legal, estimated, compiled in table[1:]:
        numbers = [int(n.replace(",", "")) for n in (candidates, legal, estimated)]
        assert numbers == sorted(numbers, reverse=True) and int(buckets) <= numbers[-1] and compiled == "-", name
    assert lines[-1].startswith("h100_sxm: 0 of 6 buckets compiled") and not list(folder.iterdir())
