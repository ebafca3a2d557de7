"""Random calls through every launcher: each launch compiles, fits and spills nothing."""

import pytest

from primer_fast.proof import sweep
from primer_fast.proof.verify import ops

OP = "scaled_dot_product_attention"

pytestmark = pytest.mark.xdist_group("offline")


def test_a_call_of_each_op_compiles_fits_and_spills_nothing(compiled):
    status, printed = compiled["sweep"]
    assert status == 0, printed
    launches, failed, *_ = (int(word) for word in printed.split() if word.isdecimal())
    assert launches >= 30 and failed == 0


def test_decoding_spills_nothing_where_larger_tiles_would(compiled):
    expected = [["attention_decode_kernel", 0, None], ["attention_combine_kernel", 0, None]]
    assert compiled["decode"] == expected * 4


def test_every_op_and_option_is_drawn():
    units = [sweep.draw(0, number) for number in range(400)]
    assert {unit.op for unit in units} == set(ops())
    assert {unit.dtype for unit in units} == {"bfloat16", "float16", "float32"}
    assert {unit.case.gradients for unit in units} == {True, False}

    def drawn(op, name):
        return {unit.case.options.get(name) for unit in units if unit.op == op}

    attention = [unit for unit in units if unit.op == OP]
    assert {1} < {unit.case.shapes["query"][-2] for unit in attention}, "decoding too"
    assert all(len(drawn(OP, name)) > 1 for name in ("softcap", "window", "dropout_p"))
    for name in ("attn_mask", "key_lengths"):
        assert len({name in unit.case.shapes for unit in attention}) == 2
    assert {1, 4} < drawn("conv2d", "groups") and {1, 2} <= drawn("conv2d", "dilation") & drawn("conv2d", "stride")
    pools = [unit.case.layouts.get("input") for unit in units if unit.op == "max_pool2d"]
    assert {None, "channels_last"} < set(pools)


def test_one_op_alone_is_drawn(monkeypatch):
    monkeypatch.setattr(sweep, "results", lambda unit: [unit, unit])
    units = list(sweep.sweep(0, 5, "conv2d"))
    assert {unit.op for unit in units} == {"conv2d"} and len(units) == 6


def test_a_draw_is_the_same_again():
    assert sweep.draw(3, 7) == sweep.draw(3, 7) != sweep.draw(4, 7)


@pytest.mark.parametrize("spilled, failure", [(0, None), (16, None), (17, "spills 17 bytes per thread")])
def test_what_fails(spilled, failure):
    unit = sweep.draw(0, 0)._replace(dtype="float16")
    assert sweep.SweptLaunch(unit, "_k", {}, spilled).failure == failure
    assert sweep.SweptLaunch(unit, "_k", {}, 0, "does not compile").failure == "does not compile"
    assert "waits" in sweep.SweptLaunch(unit, "_k", {}, 0, serialized=True).failure
    assert sweep.SweptLaunch(unit._replace(dtype="float32"), "_k", {}, 0, serialized=True).failure is None


def test_a_failure_comes_with_the_line_that_repeats_it(monkeypatch, capsys):
    def results(unit):
        yield sweep.SweptLaunch(unit, "_k", {"BLOCK": 64}, error="PTXASError: too large")
        yield sweep.SweptLaunch(unit, "_k", {"BLOCK": 32}, spill_bytes=8)

    monkeypatch.setattr(sweep, "results", results)
    assert sweep.main(["--seed", "5", "--launches", "3"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "_k {'BLOCK': 64}: PTXASError: too large"
    assert lines[1].split()[:2] == list(sweep.draw(5, 0)[:3:2])
    assert lines[2].strip() == "python -m primer_fast.proof.sweep --seed 5 --only 0"
    assert lines[5].endswith("--seed 5 --only 1") and lines[-1] == "4 launches, 2 failed, 2 parked an address"
    assert sweep.main(["--seed", "5", "--only", "1"]) == 1
    assert capsys.readouterr().out.splitlines()[2].endswith("--only 1")
