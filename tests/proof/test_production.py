"""The machine code of what is launched in production: no product waits, nothing spills."""

import json

import pytest
import triton
from compiled_rows import TABLE, all_have, names

from primer_fast.proof.sweep import PARKED

pytestmark = pytest.mark.xdist_group("offline")

COMMAND = "primer-fast kernels --dtype bfloat16 --json bench/results/offline/sm_90.json"


@pytest.fixture(scope="session")
def hopper(table):
    return [row for row in table if row["target"] == "sm_90" and row["error"] is None]


def test_no_16_bit_product_is_serialised(hopper):
    rows = [row for row in hopper if row["dtype"] != "float32"]
    assert {row["serialized"] for row in rows} <= {True, False}, "each launch has an answer"
    all_have(rows, lambda row: not row["serialized"])


def test_no_tile_spills(hopper):
    all_have(hopper, lambda row: row["resources"]["spill_bytes"] <= PARKED)


def test_max_pool_moves_neighbours_of_a_line_together(hopper):
    """ResNet's pool in NCHW, whose windows overlap: one narrow load a line beside the strip, and the byte positions."""
    rows = [row for row in hopper if (row["op"], row["case"]) == ("max_pool2d", "stem_contiguous")]
    assert {row["dtype"] for row in rows} >= {"bfloat16"}
    for row in rows:
        read, written = row["resources"]["loads"], row["resources"]["stores"]
        if row["direction"] == "forward":
            assert read == {"wide": 6, "narrow": 3} and written == {"wide": 1, "narrow": 1}, names([row])
            assert row["resources"]["instructions"] < 720, names([row])
        else:
            assert read == {"wide": 2, "narrow": 6} and written == {"wide": 4}, names([row])
            assert row["resources"]["instructions"] < 520, names([row])


def test_layer_norm_takes_both_means_by_one_reduction(hopper):
    """Two reductions would need twice the barriers of one: six or seven."""
    rows = [row for row in hopper if (row["op"], row["kernel"]) == ("layer_norm", "layer_norm_backward_kernel")]
    assert len(rows) >= 6
    all_have(rows, lambda row: row["resources"]["hot_loop"]["barriers"] <= 4)


def test_layer_norm_reads_long_rows_twice_in_one_launch(hopper):
    """Programs for rows, then those for columns, chunk by chunk; a processor runs one at a time."""
    rows = [r for r in hopper if r["op"] == "layer_norm" and r["direction"] == "backward"]
    rows = [row for row in rows if row["case"].startswith(("width_32768", "width_65536"))]
    assert {row["kernel"] for row in rows} == {"layer_norm_long_rows_kernel", "add_rows_kernel"}
    for row in (row for row in rows if row["kernel"] == "layer_norm_long_rows_kernel"):
        count, width = (4096, 32768) if "32768" in row["case"] else (1024, 65536)
        chunk, columns = row["constexprs"]["CHUNK"], row["constexprs"]["BLOCK_COLS"]
        assert row["programs"] == count // chunk * (chunk + width // columns), names([row])
        needs = row["resources"]
        assert needs["programs_per_processor"] == 1 and needs["shared_bytes"] < 96 * 2**10, names([row])


def test_what_ptxas_says_of_waiting_stands_in_the_code(hopper):
    """Each wgmma of a serialised launch is followed by a wait for all; of the others, not each where there are more."""
    for row in hopper:
        loop = row["resources"]["hot_loop"]
        number = 0 if loop is None else loop["from_shared"] + loop["from_registers"]
        if row["serialized"]:
            assert number == loop["waits"] > 0, names([row])
        elif number > 1:
            assert loop["waits"] < number, names([row])


def test_products_have_a_hot_loop_and_an_epilogue(table):
    """But where the whole reduction is one step, and for attention, whose products are not its result."""
    rows = [row for row in table if row["target"] != "gfx942" and row["op"] in ("linear", "linear_cross_entropy")]
    rows = [row for row in rows if row["error"] is None and row["resources"]["matrix"]]
    assert len(rows) > 100
    all_have(rows, lambda row: row["resources"]["hot_loop"]["products"] and row["epilogue"] > 0)


def test_other_targets_have_no_wgmma(table):
    for row in table:
        if row["target"] == "gfx942":
            assert row["resources"]["hot_loop"] is None and row["resources"]["warnings"] == []
        if row["target"] != "sm_90":
            assert row["serialized"] is None


def test_the_committed_table_is_of_this_code(compiled):
    """Which launches there are and with what settings; the code of those that are compiled.

    A launch whose digest stands in the table need not be compiled. Of the others, each flag of a kernel is, once.
    """
    content = json.loads(TABLE.read_text())
    if content["triton"] != triton.__version__:
        pytest.skip(f"the table is of Triton {content['triton']}, this is {triton.__version__}")
    fresh = compiled["production"]
    codes = {row["code"] for row in content["rows"]}
    compiled_kernels = {row["kernel"] for row in fresh if row["resources"]}
    assert {row["op"] for row in fresh} == {row["op"] for row in fresh if row["resources"]}
    assert {row["kernel"] for row in fresh if row["code"] not in codes} <= compiled_kernels
    assert [place(row) for row in content["rows"]] == [place(row) for row in fresh], f"run {COMMAND}"
    changed = [new for old, new in zip(content["rows"], fresh, strict=True) if differ(old, new)]
    assert not changed, f"run {COMMAND}: {names(changed)}"
    assert content["command"] == COMMAND


def place(row):
    return row["op"], row["case"], row["direction"], row["kernel"]


def differ(old, new):
    """Whether two rows are of different code: the same code compiled twice varies in a few instructions."""
    settings = ("programs", "constexprs", *(key for key in ("warps", "stages", "serialized") if new[key] is not None))
    if any(old[key] != new[key] for key in settings) or new["resources"] is None:
        return any(old[key] != new[key] for key in settings)
    a, b = old["resources"], new["resources"]
    exact = ("shared_bytes", "matrix", "loads", "stores", "warnings")
    near = abs(a["instructions"] - b["instructions"]) <= 0.02 * b["instructions"]
    return not near or any(a[key] != b[key] for key in exact)
