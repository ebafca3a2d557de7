"""What is compiled before a GPU is measured: the list, the processes, the file."""

import json
import time
from types import SimpleNamespace

import pytest

from primer_fast.bench import op as ops
from primer_fast.bench.stages import compile as command
from primer_fast.bench.stages.compile import CompiledTask, compile_all, units_of
from primer_fast.proof.production import cases_to_compile


def test_all_that_is_checked_or_timed_is_compiled():
    units = units_of("bfloat16")
    named = [(unit.op, unit.case.name) for unit in units]
    assert len(set(named)) == len(named)
    assert set(named) >= {(unit.op, unit.case.name) for unit in cases_to_compile()}
    assert set(named) >= {(name, case.name) for name in ops.names() for case in ops.load(name).gpu_cases}
    assert [unit.op for unit in units[: len(ops.names())]] == ops.names(), "the first case of every op first"
    assert len(units_of("float32", most=1)) == len(ops.names())


def fine(name, seconds=0.0):
    time.sleep(seconds)
    return CompiledTask(name, 2, [], seconds)


def fails(name):
    raise ValueError(f"{name} cannot be\nand more")


def test_processes_hand_in_rows_and_errors():
    rows = []
    assert compile_all([[("a", fine, "a"), ("b", fails, "b")]], [1], rows.append, 120) == []
    assert sorted(row.what for row in rows) == ["a", "b"]
    assert next(row for row in rows if row.what == "b").errors == ["ValueError: b cannot be"]


def test_launchers_of_older_tritons_are_made_beforehand(monkeypatch):
    """Where there is a GPU and a Triton that compiles one for every signature."""
    made = []
    driver = SimpleNamespace(
        CudaUtils=lambda: None, CudaLauncher=lambda *compiled: made.append(compiled), make_launcher=None
    )
    command._has_utilities.cache_clear()
    monkeypatch.setattr(command.importlib, "import_module", lambda name: driver)
    compiled = SimpleNamespace(src="source", metadata="metadata")
    for one in (compiled, None):
        command._make_launcher(one)
    assert made == [("source", "metadata")], "what did not compile has none"
    del driver.make_launcher
    command._make_launcher(compiled)
    assert len(made) == 1
    driver.make_launcher, driver.CudaUtils = None, fails_to_find
    command._has_utilities.cache_clear()
    command._make_launcher(compiled)
    assert len(made) == 1, "no CUDA library, no launcher"
    command._has_utilities.cache_clear()


def fails_to_find():
    raise AssertionError("libcuda.so cannot found!")


def test_what_does_not_end_in_time_is_named():
    assert compile_all([[("slow", fine, "slow", 1000.0)]], [1], lambda row: None, 1.0) == ["slow"]


def test_the_file_is_whole_after_every_row(tmp_path, monkeypatch, capsys):
    path, seen = tmp_path / "compile.json", []

    def played(tasks, jobs, after, seconds):
        for row in ("linear a bfloat16", 3, [], 1.0), ("linear b bfloat16", 2, ["out of registers"], 1.0):
            after(CompiledTask(*row))
            seen.append(json.loads(path.read_text())["launches"])
        return ["linear c bfloat16"]

    monkeypatch.setattr(command, "compile_all", played)
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command.environment, "describe", lambda kind, small: {"device": kind, "small": small})
    assert command.main(["--json", str(path), "--small"]) == 1
    content = json.loads(path.read_text())
    assert seen == [3, 5] and content["launches"] == 5 and content["left_out"] == ["linear c bfloat16"]
    assert content["schema"] == "compiled 1" and content["header"] == {"device": "cuda", "small": True}
    assert "5 launches" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["--jobs", "0"], ["--budget", "0"]])
def test_wrong_calls(tmp_path, wrong):
    with pytest.raises(SystemExit):
        command.main(["--json", str(tmp_path / "x.json"), *wrong])
