import os
import time
from collections import Counter

import pytest
import torch
from train.test_cuda_graphs import StandIn

from primer_fast.bench import report
from primer_fast.bench.op import production
from primer_fast.bench.programs import recorded_step
from primer_fast.bench.report import RIGHT
from primer_fast.bench.stages import right
from primer_fast.bench.stages.right import Check, checks, rows_of
from primer_fast.bench.units import LOST, DeviceLost
from primer_fast.proof import on_gpu, verify
from primer_fast.proof.native import CheckedTensor
from primer_fast.reference.case import Case
from primer_fast.reference.ops import OPS
from primer_fast.train import cuda_graphs

UNIT = Check("values", "linear", Case("some", "", {}), "float32")


def test_the_order_is_that_of_importance():
    units = checks()
    order = [(unit.check == "values", unit.dtype) for unit in units]
    dtypes = [dtype for is_values, dtype in order if is_values]
    assert dtypes == sorted(dtypes, key=["bfloat16", "float32", "float16"].index)
    others = [i for i, (is_values, _) in enumerate(order) if not is_values]
    assert others == list(range(others[0], others[-1] + 1)), "between bfloat16's values and the others'"
    assert dtypes[others[0] - 1] == "bfloat16" and order[others[-1] + 1] == (True, "float32")
    assert {unit.op for unit in units[: len(verify.ops())]} == set(verify.ops()), "the first of each op comes first"
    assert len({str(unit) for unit in units}) == len(units)


def test_every_production_case_in_every_dtype():
    tried = Counter((unit.op, unit.case.name) for unit in checks() if unit.check == "values")
    wanted = {(op, case.name) for op in verify.ops() for case in production(OPS[op].cases)}
    assert tried.keys() == wanted and set(tried.values()) == {3}


def test_every_op_has_every_check():
    for small in (True, False):
        by_check = {check: {unit.op for unit in checks(small=small) if unit.check == check} for check in on_gpu.CHECKS}
        assert by_check.pop("one pass") == {on_gpu.ATTENTION}
        assert by_check.pop("second GPU") == {"any"} or torch.cuda.device_count() > 1
        assert all(ops >= set(verify.ops()) for ops in by_check.values())
        assert {unit.case.name for unit in checks(small=small) if unit.op == "training step"} == (
            {"mlp", "ppo"} if small else {*recorded_step.MODELS}
        )
    assert "training step" not in {unit.op for unit in checks(["linear"])}


def test_the_estimate_leaves_room_in_a_hundred_seconds():
    assert 20 < right.estimate(checks()) < 100


def test_an_error_is_a_row(monkeypatch):
    def broken(*_):
        raise RuntimeError("out of luck\nand more")

    monkeypatch.setitem(on_gpu.CHECKS, "values", broken)
    (row,) = rows_of(UNIT, small=True)
    assert row == UNIT.row("RuntimeError: out of luck").as_dict() | {"seconds": row["seconds"]} and not row["passed"]

    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(DeviceLost, match="out of luck"):
        rows_of(UNIT, small=True)


def test_a_crash_and_a_hang_are_rows_and_the_next_process_goes_on(tmp_path, monkeypatch):
    path, log = tmp_path / "right.json", tmp_path / "log"

    def check(op, case, dtype):
        with log.open("a") as file:
            file.write(f"{case.name}\n")
        if case.name == "crash":
            os._exit(11)
        if case.name == "hang":
            time.sleep(1000)
        return [CheckedTensor("values", op, case.name, "float32", "output", 1.0, 2.0, 0.5, True, truth="float64")]

    units = [UNIT._replace(case=Case(name, "", {})) for name in ("first", "crash", "hang", "last")]
    monkeypatch.setattr(right, "_PATIENCE", 2.0)
    monkeypatch.setattr(right, "checks", lambda *_: units)
    monkeypatch.setattr(right, "estimate", lambda units: 0.0)
    monkeypatch.setitem(on_gpu.CHECKS, "values", check)
    ended = []
    for more in ([], ["--resume"], ["--resume"], ["--resume"]):
        child = os.fork()
        if child == 0:
            status = 70  # of what must not go on as another pytest
            try:
                status = right.main(["--json", str(path), *more])
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        ended.append((status, path.with_suffix(".begun").exists()))
    assert ended == [(11, True), (LOST, False), (1, False), (1, False)], "the marker says what nobody else could"
    assert log.read_text().split() == ["first", "crash", "hang", "last"]
    found = report.load(path, RIGHT)
    assert [(row["case"], row["passed"]) for row in found.rows] == [
        ("first", True), ("crash", False), ("hang", False), ("last", True)
    ]  # fmt: skip
    assert "process ended" in found.rows[1]["reason"] and "had not ended" in found.rows[2]["reason"]
    assert found.left_out == [] and {p.name for p in tmp_path.iterdir()} == {"right.json", "log"}


def test_the_command_tries_what_there_is_time_for(tmp_path, monkeypatch, capsys):
    """It says of each unit what its worst tensor is."""

    def row(tensor, *figures, **more):
        return CheckedTensor("values", "linear", "some", "float32", tensor, *figures, **more).as_dict()

    rows = [row("output", 0.5, 1.0, 0.5, True)]
    monkeypatch.setattr(right, "rows_of", lambda unit, small: rows)
    path = tmp_path / "right.json"
    command = ["linear", "--json", str(path), "--small"]
    assert right.main([*command, "--budget", "-1"]) == 0
    found = report.load(path, RIGHT)
    assert found.rows == [] and found.left_out == [str(unit) for unit in checks(["linear"], small=True)]
    assert right.main(command) == 0 and report.load(path, RIGHT).left_out == []
    assert "ok     values linear primer_first bfloat16" in capsys.readouterr().out
    rows.append(row("weight", 1.2, 1.0, 0.5, False))
    assert right.line(UNIT, rows).startswith("FAILED") and "weight" in right.line(UNIT, rows)
    rows.append(row("input", reason="no number"))
    assert right.line(UNIT, rows).endswith("no number") and right.main(command) == 1
    assert right.line(UNIT, [UNIT.row("there is one GPU", passed=None).as_dict()]).startswith("none")
    with pytest.raises(SystemExit) as stop:
        right.main(["linaer", *command[1:]])
    assert stop.value.code == 2 and "op must be one of" in capsys.readouterr().err


@pytest.mark.parametrize("works", [True, False])
def test_recorded_steps_are_the_steps(works, plain_path, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "CudaGraphs", StandIn)
    if not works:
        monkeypatch.setattr(StandIn, "replay", lambda *_: None)
    for name in recorded_step.MODELS:
        rows = {row.tensor: row.passed for row in recorded_step.recorded_step(name, "cpu", True)}
        assert {"weights", "moments", "loss", "grad_norm"} <= rows.keys()
        assert all(rows.values()) if works else not rows["weights"], name


def test_what_is_launched_here_is_compiled_beforehand():
    known = {(op, case.name) for op in verify.ops() for case in production(OPS[op].cases)}
    known |= {(op, case.name) for op, case in right.other_cases()}
    assert {(unit.op, unit.case.name) for unit in checks() if unit.op in verify.ops()} <= known
