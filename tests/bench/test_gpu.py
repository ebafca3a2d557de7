"""The stages of `make gpu` as processes: order, limits, restarts, and what stands in the folder at any moment."""

import os
import signal
import sys
from dataclasses import replace

import pytest
import torch
from processes import ends

from primer_fast.bench import gpu
from primer_fast.bench.gpu import Stage, run_all, run_stage
from primer_fast.bench.stages import summary
from primer_fast.bench.units import LOST

HEADER = {"device": "A GPU", "commit": None, "date": "2026-01-02", "driver": None}
HEADER |= dict.fromkeys(("python", "torch", "triton", "cuda"), "1")
WRITES = "import sys\nopen(sys.argv[sys.argv.index('--json') + 1], 'w').close()\n"


@pytest.fixture
def stage(tmp_path):
    """Makes a stage that runs some code."""
    folder = tmp_path / "modules"
    folder.mkdir()

    def make(code, name="right", share=0.5, writes=True):
        module = f"stage_{name}"
        (folder / f"{module}.py").write_text((WRITES if writes else "") + code)
        return Stage(name, share, module, tmp_path / f"{name}.json", environment={"PYTHONPATH": str(folder)})

    return make


@pytest.fixture
def ran(stage, tmp_path):
    """Runs a stage that runs some code -> how it ended, and the lines that it wrote to the log."""

    def run(code, limit=60.0, **options):
        made = code if isinstance(code, Stage) else stage(code)
        return run_stage(made, tmp_path / summary.MEASURED.log, limit, **options).status, said(tmp_path)

    return run


def said(folder):
    return [line for line in (folder / summary.MEASURED.log).read_text().splitlines() if line and "=====" not in line]


def test_goes_on_past_a_failure_and_a_timeout(tmp_path, stage):
    todo = [
        stage("print('one'); raise SystemExit(1)", "right"),
        stage("import time; print('two', flush=True); time.sleep(1000)", "fast", share=0.1),
        stage("print('three')", "programs"),
    ]
    outcomes = run_all(todo, tmp_path, 30, HEADER)
    assert [o.name for o in outcomes] == ["right", "fast", "programs"] and outcomes[2].passed
    assert outcomes[0].status == "failed (exit 1)" and outcomes[1].status.startswith("stopped after ")
    lines = said(tmp_path)
    assert lines[:2] == ["one", "two"] and lines[-1] == "three"
    page = (tmp_path / "summary.md").read_text()
    assert all(f"- {o.name}: {o.status}" in page for o in outcomes)


def test_a_stage_is_given_its_budget(tmp_path, stage):
    code = "print(sys.argv[sys.argv.index('--budget') + 1], '--resume' in sys.argv, '--small' in sys.argv)"
    run_all([stage(code, "right", share=0.25), stage(code, "fast", share=1.0)], tmp_path, 100, HEADER)
    first, second = map(str.split, said(tmp_path))
    assert 14 <= float(first[0]) <= 16  # a quarter of 90, less what it needs for ending
    assert 70 <= float(second[0]) <= 82  # what the first stage did not use is the second's
    assert first[1:] == second[1:] == ["False", "False"]


@pytest.mark.parametrize("end", [f"raise SystemExit({LOST})", "import os; os.kill(os.getpid(), 11)"])
def test_a_process_that_cannot_go_on_is_followed_by_another(ran, end):
    """The second is told to resume, and what it says in the end is what the stage says."""
    status, lines = ran(f"print('--resume' in sys.argv, flush=True)\nif '--resume' not in sys.argv:\n    {end}")
    assert lines == ["False", "True"] and status == "failed (1 processes ended early); the last one: passed"


def test_a_stage_that_cannot_pass_says_why(ran, stage, monkeypatch):
    assert ran(f"raise SystemExit({LOST})", 10)[0] == f"failed (exit {LOST})", "no time for another process"
    assert ran(stage("", name="silent", writes=False), 10)[0] == "failed (exit 0, but no silent.json)"
    monkeypatch.setattr(Stage, "command", lambda *_, **__: ["/no/such/program"])
    assert ran("", 5)[0].startswith("not started: ")


def test_what_a_stopped_stage_started_is_stopped_too(ran):
    child = "import time; time.sleep(1000)"
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"  # will not listen
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(1000)"
    )
    status, (pid,) = ran(code, limit=3, grace=0.5)
    assert status == "stopped after 3 s" and ends(pid)


def test_an_interrupted_stage_can_still_write(ran):
    """Even where this process ignores SIGINT, as what a shell runs in its background does."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        code = "import time\ntry:\n  time.sleep(1000)\nexcept KeyboardInterrupt:\n  print('saved')"
        assert ran(code, limit=2)[1] == ["saved"]
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_stage_has_its_environment_and_a_long_log_keeps_both_ends(ran, stage, tmp_path, monkeypatch):
    made = stage("import os; print(os.environ['TRITON_INTERPRET'], 'PATH' in os.environ)")
    made.environment["TRITON_INTERPRET"] = "1"
    assert ran(made) == ("passed", ["1 True"])
    monkeypatch.setattr(gpu, "LOG_BYTES", 1000)
    ran("print('begin' + 'x' * 5000 + 'end')")
    text = (tmp_path / summary.MEASURED.log).read_text()
    assert len(text) < 1100 and "begin" in text and text.endswith("end\n") and "shortened" in text


def test_only_a_rehearsal_is_small_and_on_a_stand_in(tmp_path):
    real, rehearsed = ({s.name: s for s in gpu.stages(tmp_path, rehearsed)} for rehearsed in (False, True))
    for name, one in (real | {"tune": gpu.tune_stage(tmp_path)}).items():
        command = one.command(100)
        assert command[:3] == [sys.executable, "-u", "-m"] and not one.environment
        assert {"--json", str(tmp_path / f"{name}.json"), "--budget", "92"} <= set(command)
        assert not {"--small", "--resume", "primer_fast.bench.stages.rehearsal"} & set(command)
    again = rehearsed["right"].command(100, resume=True)
    assert again[3:5] == ["primer_fast.bench.stages.rehearsal", "primer_fast.bench.stages.right"]
    assert again[-2:] == ["--small", "--resume"]
    assert [name for name, s in rehearsed.items() if s.environment] == ["right"], "its kernels are interpreted"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("code", "status"), [("", 0), ("raise SystemExit(1)", 1)])
def test_exit_status_and_the_page_printed_last(tmp_path, stage, monkeypatch, capsys, code, status):
    rehearsal = tmp_path / "rehearsal"
    rehearsal.mkdir()
    made = [replace(one, leaves=rehearsal / one.leaves.name) for one in (stage(""), stage(code, "fast"))]
    monkeypatch.setattr(gpu, "stages", lambda *_: made)
    for older in ("fast.json", "right.begun"):
        (rehearsal / older).write_text("an older run's")
    (tmp_path / "fast.json").write_text("measured")
    assert gpu.main(["--out", str(tmp_path), "--minutes", "0.5", "--rehearse"]) == status
    assert (rehearsal / "fast.json").read_text() == "" and not (rehearsal / "right.begun").exists()
    assert (tmp_path / "fast.json").read_text() == "measured", "a rehearsal replaces nothing that was measured"
    printed = capsys.readouterr().out
    assert f"- fast: {'passed' if status == 0 else 'failed (exit 1)'}" in printed.split("# ", 1)[1]


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Calls the command -> the seconds and the stages that it would run."""
    runs = []
    monkeypatch.setattr(gpu, "run_all", lambda todo, out, seconds, *_: runs.append((seconds, todo)) or [])

    def ask(*arguments):
        assert gpu.main(["--out", str(tmp_path), "--rehearse", *arguments]) == 0
        return runs.pop()

    return ask


@pytest.mark.parametrize(
    ("only", "seconds", "names"),
    [
        ([], 360, ["compile", "right", "fast", "programs", "sanitizer"]),  # the search must be asked for
        (["--only", "right"], 360, ["right"]),
        (["--only", "fast", "right"], 360, ["right", "fast"]),
        (["--only", "tune"], 240, ["tune"]),
    ],
)
def test_stages_by_name(asked, only, seconds, names):
    given, stages = asked(*only)
    assert (given, [stage.name for stage in stages]) == (seconds, names)
    assert stages[-1].share == 1.0, "the last has all that is left"
    with pytest.raises(SystemExit):
        asked("--only", "nothing")


def test_the_search_begins_with_the_worst_rows_that_were_measured(asked, tmp_path):
    """It leaves the page and the log of the measurement alone."""
    folder = tmp_path / "rehearsal"
    folder.mkdir()
    for name in ("fast.json", *summary.MEASURED):
        (folder / name).write_text("measured")
    for arguments, report in (([], folder / "fast.json"), (["--from", "/other.json"], "/other.json")):
        command = asked("--only", "tune", *arguments)[1][0].command(100)
        assert command[command.index("--from") + 1] == str(report)
    assert {(folder / name).read_text() for name in ("fast.json", *summary.MEASURED)} == {"measured"}


def test_a_home_that_cannot_be_written_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert gpu.writable_home() == {}
    monkeypatch.setenv("HOME", str(tmp_path / "nowhere"))
    assert os.access(gpu.writable_home()["HOME"], os.W_OK)
