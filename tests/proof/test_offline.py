"""Ahead-of-time compilation: offline() records what a launch would be, and every op's kernels compile well.

Kernels cannot be compiled in a process that interprets them, so what compiles here runs in processes of its own.
"""

import pytest
from compiled_rows import all_have, names

from primer_fast import backend
from primer_fast.proof import resources
from primer_fast.proof.offline import offline
from primer_fast.proof.targets import TARGETS

pytestmark = pytest.mark.xdist_group("offline")  # one process has what the session's fixture compiles

FEW_RESULTS = (  # kernels whose whole result is a number or two a row, column or channel
    "conv2d_depthwise_weight_kernel", "add_rows_kernel", "embedding_join_kernel", "logits_statistics_kernel",
    "logits_combine_kernel", "linear_cross_entropy_reduce_kernel", "attention_statistics_kernel",
    "attention_combine_kernel",
)  # fmt: skip
FEW_ROWS = ("attention_decode_kernel",)  # a query at a time: its products have fewer rows than wgmma takes
UNALIGNED = (  # cases that cannot move 16 bytes at a time
    "odd", "digits",  # rows do not start on 16-byte boundaries: of the latter those of its 10 classes
    "resnet_stem", "mnist_first", "mnist_second",  # channels are too few to fill 16 bytes, or not adjacent
    "bias_72_729", "softcap_72_2k",  # rows of 72 elements: Triton sees multiples of 16
    "mnist",  # lines of 28 pixels, 14 outputs: 8 and 4 bytes at a time
)  # fmt: skip


def test_a_launch_is_recorded_as_it_would_run(seen):
    launch = seen["aligned"]["sm_90"]
    assert launch["grid"] == [4, 2] and launch["programs"] == 8
    assert launch["constexprs"] == {"BLOCK": 1024} and launch["options"] == {"num_warps": 4}


def test_launchers_see_the_target(seen):
    assert seen["driver"] == {
        "sm_80": ["cuda", 80, 108, 166912],
        "sm_90": ["cuda", 90, 132, 232448],
        "sm_100": ["cuda", 100, 148, 232448],
        "gfx942": ["hip", "gfx942", 304, 65536],
    }


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_alignment_decides_the_code(seen, target):
    aligned, misaligned = seen["aligned"][target], seen["misaligned"][target]
    assert aligned["loads"] == {"wide": 1} and aligned["stores"] == {"wide": 1}
    assert misaligned["loads"] == {"narrow": 8} and misaligned["stores"] == {"wide": 1}


def test_divisibility_of_sizes_decides_the_code(seen):
    assert seen["no multiple of 16"]["loads"] == {"narrow": 8}


def test_equal_digests_are_of_equal_code(seen):
    """It is of the kernel and all it calls, its arguments' types, alignment and sizes, its options, its target."""
    first = seen["aligned"]["sm_90"]["code"]
    assert seen["again"]["code"] == first
    others = [seen["aligned"]["sm_100"], seen["misaligned"]["sm_90"], seen["no multiple of 16"], seen["more warps"]]
    assert len({first, *(launch["code"] for launch in others)}) == 5
    two, again, three = seen["codes"]
    assert two == again != three


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_spills_are_seen(seen, target):
    tight, roomy = seen["centre"][f"{target} 1"], seen["centre"][f"{target} 16"]
    assert tight["spills"] and tight["spill_bytes"] > 0 and tight["spill_instructions"] > 0
    assert tight["registers"] == (512 if target == "gfx942" else 255)
    assert tight["programs_per_processor"] == (4 if target == "gfx942" else 8)  # 65536 // (256 * 32)
    assert not roomy["spills"] and roomy["spill_bytes"] == 0 and roomy["spill_instructions"] == 0


@pytest.mark.parametrize(
    ("target", "opcode"), [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTCHMMA"), ("gfx942", "mfma")]
)
def test_matrix_instructions_are_seen(seen, target, opcode):
    product = seen["product"][target]
    assert list(product["matrix"]) == [opcode] and product["ffma"] == 0
    wide = "wide" if target == "gfx942" else "async wide"
    assert list(product["loads"]) == [wide] and list(product["stores"]) == ["wide"]


def test_too_much_shared_memory_is_an_error(seen):
    message = "SharedMemoryExceeded: _product_kernel asks for 327680 bytes of shared memory; H100 SXM has 232448"
    assert seen["too much shared memory"]["error"].startswith(message)
    assert seen["too much, raised"].startswith(message)


def test_an_error_of_the_compiler_is_raised_or_recorded(seen):
    assert seen["refused, raised"].startswith("CompileTimeAssertionFailure")
    assert seen["refused"] == ["CompileTimeAssertionFailure: BLOCK is too small", None]


def test_everything_is_as_before_after_an_error(seen):
    assert seen["left by"] == "KeyError: True"  # the driver, JITFunction.run, ... were others inside
    assert seen["restored"] is True


def test_unknown_target(seen):
    assert (
        seen["unknown target"] == "ValueError: offline: target must be one of sm_80, sm_90, sm_100, gfx942; got 'sm_70'"
    )


def test_refuses_an_interpreting_process(monkeypatch):
    monkeypatch.setattr(backend, "interpreting", True)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 was set when Triton was imported"), offline("sm_90"):
        pass


@pytest.mark.parametrize(
    ("target", "warps", "registers", "shared", "programs"),
    [
        ("sm_90", 8, 128, 0, 2),
        ("sm_90", 8, 129, 0, 1),
        ("sm_90", 4, 32, 0, 16),
        ("sm_90", 4, 32, 75 * 1024, 3),
        ("sm_90", 1, 24, 0, 32),
        ("sm_80", 4, 64, 81 * 1024, 2),
        ("sm_90", 8, 64, 232448, 1),
        ("gfx942", 4, 86, 16384, 4),
        ("gfx942", 4, 128, 0, 4),
        ("gfx942", 8, 140, 0, 1),
    ],
)
def test_occupancy(target, warps, registers, shared, programs):
    assert TARGETS[target].resident_programs(warps, registers, shared) == programs


def test_tensor_memory_limits_occupancy():
    assert TARGETS["sm_100"].resident_programs(4, 32, 0) == 16
    assert TARGETS["sm_100"].resident_programs(4, 32, 0, tensor_columns=256) == 2


# --- the table of the ops' own kernels


def wide_loads(row):
    return sum(row["resources"]["loads"].get(kind, 0) for kind in ("tma", "async wide", "wide"))


def wide_stores(row):
    return sum(row["resources"]["stores"].get(kind, 0) for kind in ("tma", "wide"))


def compiled(table, *targets, unaligned=True):
    return [
        row
        for row in table
        if row["error"] is None
        and row["target"] in (targets or TARGETS)
        and (unaligned or row["case"] not in UNALIGNED)
    ]


def products(table, *targets):
    """Launches that multiply matrices: along a reduction in blocks of BLOCK_K, or queries with keys and weights."""
    attention = ("attention_forward_kernel", "attention_backward_kv_kernel", "attention_backward_q_kernel")
    multiplying = (*attention, *FEW_ROWS)
    rows = compiled(table, *targets)
    return [row for row in rows if "BLOCK_K" in row["constexprs"] or row["kernel"] in multiplying]


def large(row):
    """Whether a product has the 64 rows that wgmma and tcgen05 take."""
    if "BLOCK_K" not in row["constexprs"]:
        return row["kernel"] not in FEW_ROWS
    return row["constexprs"]["BLOCK_M"] >= 64


def test_every_kernel_compiles(table):
    all_have(table, lambda row: row["error"] is None)
    assert {row["target"] for row in table} == set(TARGETS)
    assert {row["direction"] for row in table} == {"forward", "backward"}


def test_products_use_matrix_units(table):
    all_have(products(table), lambda row: row["resources"]["matrix"])


@pytest.mark.parametrize(
    ("target", "opcode"), [("sm_90", "HGMMA"), ("sm_80", "HMMA"), ("sm_100", "UTCHMMA"), ("gfx942", "mfma")]
)
def test_large_16_bit_products_use_the_targets_own_unit(table, target, opcode):
    rows = [r for r in products(table, target) if r["dtype"] != "float32" and large(r)]
    all_have(rows, lambda row: opcode in row["resources"]["matrix"])


def test_all_products_of_a_convolution_use_wgmma(table):
    """y, dx and dw; but not dw of the digit CNN's first layer, which has 32 rows where wgmma takes 64."""
    rows = [r for r in products(table, "sm_90") if r["op"] == "conv2d" and r["dtype"] != "float32"]
    without = [row for row in rows if "HGMMA" not in row["resources"]["matrix"]]
    known = {("mnist_first", "conv2d_weight_kernel")}
    assert {(row["case"], row["kernel"]) for row in without} <= known, names(without)
    of_conv2d = {f"conv2d_{part}_kernel" for part in ("boxes", "gather", "weight")}
    assert {row["kernel"] for row in rows} == {"matmul_kernel", *of_conv2d}


def test_dw_of_resnet_layers_fills_the_chip(table):
    """The sum over pixels is split over at least 95 % of 132 multiprocessors."""
    rows = [r for r in compiled(table, "sm_90") if r["case"].startswith("resnet_") and r["dtype"] == "bfloat16"]
    of_case = {row["case"]: [] for row in rows}
    for row in rows:
        if row["direction"] == "backward" and "BLOCK_K" in row["constexprs"]:
            of_case[row["case"]].append(row)  # dx, then dw
    assert len(of_case) >= 20
    few = {case: rows[-1]["programs"] for case, rows in of_case.items() if rows[-1]["programs"] < 0.95 * 132}
    assert not few


def test_attention_and_the_loss_head_multiply_on_wgmma_throughout(table):
    """Forward and backward: every kernel that multiplies, in every production case."""
    ops = ("scaled_dot_product_attention", "linear_cross_entropy", "linear_log_prob")
    rows = [r for r in products(table, "sm_90") if r["op"] in ops and r["dtype"] == "bfloat16" and large(r)]
    assert {r["kernel"] for r in rows} == {
        "attention_forward_kernel", "attention_backward_kv_kernel", "attention_backward_q_kernel",
        "logits_statistics_kernel", "logits_gradient_kernel", "matmul_kernel",
    }  # fmt: skip
    all_have(rows, lambda row: set(row["resources"]["matrix"]) == {"HGMMA"})


def test_memory_is_read_16_bytes_at_a_time(table):
    # Of these, one reads partial results of the few rows of a decoding step, the other a few numbers a row
    few = ("attention_combine_kernel", "logits_combine_kernel")
    all_have([row for row in compiled(table, unaligned=False) if row["kernel"] not in few], wide_loads)


def test_sm_90_writes_16_bytes_at_a_time(table):
    all_have([r for r in compiled(table, "sm_90", unaligned=False) if r["kernel"] not in FEW_RESULTS], wide_stores)


def test_programs_fit_the_chip(table):
    all_have(compiled(table), lambda r: r["resources"]["shared_bytes"] <= TARGETS[r["target"]].shared_per_program)
    all_have(compiled(table), lambda row: row["resources"]["programs_per_processor"] >= 1)


def test_a_number_that_a_tool_does_not_give():
    assert resources._number("REG:", "STACK:8 REG:24") == 24
    with pytest.raises(ValueError, match="with a number after 'REG:'; got none"):
        resources._number("REG:", "STACK:8")
