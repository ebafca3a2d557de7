"""The stages of `make gpu` as processes: order, limits, restarts, and what stands in the folder at any moment."""

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from primer_fast.bench import gpu, summary
from primer_fast.bench.gpu import Stage, run_all, run_stage
from primer_fast.bench.units import LOST

HEADER = {
    "device": "A GPU",
    "commit": None,
    "date": "2026-01-02",
    **dict.fromkeys(("python", "torch", "triton", "cuda"), "1"),
}
HEADER["driver"] = None
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


def log_of(folder: Path) -> str:
    return (folder / summary.MEASURED.log).read_text()


def test_goes_on_past_a_failure_and_a_timeout(tmp_path, stage):
    todo = [
        stage("print('one'); raise SystemExit(1)", "right"),
        stage("import time; print('two', flush=True); time.sleep(1000)", "fast", share=0.1),
        stage("print('three')", "programs"),
    ]
    outcomes = run_all(todo, tmp_path, 30, HEADER)
    assert [o.name for o in outcomes] == ["right", "fast", "programs"]
    assert outcomes[0].status == "failed (exit 1)"
    assert outcomes[1].status.startswith("stopped after ")
    assert outcomes[2].passed
    words = log_of(tmp_path).replace("=", "").split()
    assert words[:4] == ["right", "one", "fast", "two"] and words[-2:] == ["programs", "three"]
    page = (tmp_path / "summary.md").read_text()
    assert "- right: failed (exit 1)" in page
    assert "- fast: stopped after " in page
    assert "- programs: passed" in page


def test_a_stage_is_given_its_budget(tmp_path, stage):
    code = "print(sys.argv[sys.argv.index('--budget') + 1], '--resume' in sys.argv, '--small' in sys.argv)"
    todo = [stage(code, "right", share=0.25), stage(code, "fast", share=1.0)]
    run_all(todo, tmp_path, 100, HEADER)
    first, second = (line.split() for line in log_of(tmp_path).splitlines() if line and "=" not in line)
    assert 14 <= float(first[0]) <= 16  # a quarter of 90, less what it needs for ending
    assert 78 <= float(second[0]) <= 82  # what the first stage did not use is the second's
    assert first[1:] == second[1:] == ["False", "False"]


@pytest.mark.parametrize("end", [f"raise SystemExit({LOST})", "import os; os.kill(os.getpid(), 11)"])
def test_a_process_that_cannot_go_on_is_followed_by_another(tmp_path, stage, end):
    """The second is told to resume, and what it says in the end is what the stage says."""
    code = f"print('--resume' in sys.argv, flush=True)\nif '--resume' not in sys.argv:\n    {end}"
    outcome = run_stage(stage(code), tmp_path / summary.MEASURED.log, 60)
    assert [line for line in log_of(tmp_path).splitlines() if line and "=" not in line] == ["False", "True"]
    assert outcome.status == "failed (1 processes ended early); the last one: passed" and not outcome.passed


def test_no_process_is_started_again_without_time_for_it(tmp_path, stage):
    outcome = run_stage(stage(f"raise SystemExit({LOST})"), tmp_path / summary.MEASURED.log, 10)
    assert outcome.status == f"failed (exit {LOST})"


def test_what_a_stopped_stage_started_is_stopped_too(tmp_path, stage):
    child = "import time; time.sleep(1000)"
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"  # will not listen
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "print('child', child.pid, flush=True)\n"
        "time.sleep(1000)"
    )
    outcome = run_stage(stage(code), tmp_path / summary.MEASURED.log, limit=3, grace=0.5)
    assert outcome.status == "stopped after 3 s"
    pid = int(log_of(tmp_path).split()[-1])
    for _ in range(600):
        if not _alive(pid):
            break
        time.sleep(0.1)
    assert not _alive(pid)


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:  # a zombie that nobody has collected yet is dead
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_an_interrupted_stage_can_still_write(tmp_path, stage):
    """Even where this process ignores SIGINT, as what a shell runs in its background does."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        code = "import time\ntry:\n  time.sleep(1000)\nexcept KeyboardInterrupt:\n  print('saved')"
        run_stage(stage(code), tmp_path / summary.MEASURED.log, limit=2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert log_of(tmp_path).endswith("saved\n")


def test_a_stage_has_its_environment(tmp_path, stage):
    made = stage("import os; print(os.environ['TRITON_INTERPRET'], 'PATH' in os.environ)")
    made.environment["TRITON_INTERPRET"] = "1"
    assert run_stage(made, tmp_path / summary.MEASURED.log, 10).passed
    assert log_of(tmp_path).endswith("1 True\n")


def test_a_stage_that_leaves_nothing_has_not_passed(tmp_path, stage):
    outcome = run_stage(stage("", writes=False), tmp_path / summary.MEASURED.log, 10)
    assert outcome.status == "failed (exit 0, but no right.json)"


def test_a_command_that_is_not_there(tmp_path, stage, monkeypatch):
    monkeypatch.setattr(Stage, "command", lambda *_, **__: ["/no/such/program"])
    assert run_stage(stage(""), tmp_path / summary.MEASURED.log, 5).status.startswith("not started: ")


def test_a_long_log_keeps_both_ends(tmp_path, stage, monkeypatch):
    monkeypatch.setattr(gpu, "LOG_BYTES", 1000)
    run_stage(stage("print('begin' + 'x' * 5000 + 'end')"), tmp_path / summary.MEASURED.log, 10)
    text = log_of(tmp_path)
    assert len(text) < 1100 and "begin" in text and text.endswith("end\n") and "shortened" in text


def test_the_real_commands(tmp_path):
    real, rehearsed = ({s.name: s for s in gpu.stages(tmp_path, rehearsed)} for rehearsed in (False, True))
    assert list(real) == ["compile", "right", "fast", "programs", "sanitizer"]
    assert not any(s.environment for s in real.values())
    command = real["right"].command(100)
    assert command == [sys.executable, "-u", "-m", "primer_fast.bench.right", "--json", str(tmp_path / "right.json"),
                       "--budget", "92"]  # fmt: skip
    again = rehearsed["right"].command(100, resume=True)
    assert again[3:5] == ["primer_fast.bench.rehearsal", "primer_fast.bench.right"]
    assert again[-2:] == ["--small", "--resume"]
    assert [name for name, s in rehearsed.items() if s.environment] == ["right"], "its kernels are interpreted"
    search = gpu.tune_stage(tmp_path, report=Path("fast.json")).command(100)
    assert search[3:9] == ["primer_fast.tuning", "--out", str(tmp_path / "tuned"), "--from", "fast.json", "--json"]
    files = {*(s.leaves.name for s in real.values()), summary.MEASURED.page, summary.MEASURED.log}
    assert len(files) <= 8, "as performance.md says"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("code", "status"), [("", 0), ("raise SystemExit(1)", 1)])
def test_exit_status_and_the_page_printed_last(tmp_path, stage, monkeypatch, capsys, code, status):
    made = [stage(""), stage(code, "fast")]
    monkeypatch.setattr(gpu, "stages", lambda *_: made)
    rehearsal = tmp_path / "rehearsal"
    rehearsal.mkdir()
    (rehearsal / "fast.json").write_text("an older run's")
    (rehearsal / "right.begun").write_text("an older run's")
    (tmp_path / "fast.json").write_text("measured")
    made = [replace(one, leaves=rehearsal / one.leaves.name) for one in made]
    assert gpu.main(["--out", str(tmp_path), "--minutes", "0.5", "--rehearse"]) == status
    assert (rehearsal / "fast.json").read_text() == "" and not (rehearsal / "right.begun").exists()
    assert (tmp_path / "fast.json").read_text() == "measured", "a rehearsal replaces nothing that was measured"
    printed = capsys.readouterr().out
    assert f"- fast: {'passed' if status == 0 else 'failed (exit 1)'}" in printed.split("# ", 1)[1]


def test_stages_by_name(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(gpu, "run_all", lambda todo, out, seconds, *_: ran.append((seconds, todo)) or [])

    def todo(*only):
        assert gpu.main(["--out", str(tmp_path), "--rehearse", *only]) == 0
        return ran.pop()

    def names(*only):
        seconds, stages = todo(*only)
        return seconds, [stage.name for stage in stages]

    assert names() == (360, ["compile", "right", "fast", "programs", "sanitizer"]), "the search is asked for"
    assert names("--only", "fast", "right") == (360, ["right", "fast"])
    assert names("--only", "tune") == (240, ["tune"])
    for only in (["right"], ["right", "fast"], ["tune"]):
        assert todo("--only", *only)[1][-1].share == 1.0, "the last has all that is left"
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), "--rehearse", "--only", "nothing"])


def test_the_search_begins_with_the_worst_rows_that_were_measured(tmp_path, monkeypatch):
    """It leaves the page and the log of the measurement alone."""
    ran = []
    monkeypatch.setattr(gpu, "run_all", lambda todo, *_: ran.append(todo[0].command(100)) or [])
    folder = tmp_path / "rehearsal"
    folder.mkdir()
    for name in ("fast.json", *summary.MEASURED):
        (folder / name).write_text("measured")
    command = ["--out", str(tmp_path), "--rehearse", "--only", "tune"]
    assert gpu.main(command) == 0
    assert ran[0][ran[0].index("--from") + 1] == str(folder / "fast.json")
    assert gpu.main([*command, "--from", str(tmp_path / "other.json")]) == 0
    assert ran[1][ran[1].index("--from") + 1] == str(tmp_path / "other.json")
    assert {(folder / name).read_text() for name in ("fast.json", *summary.MEASURED)} == {"measured"}


def test_a_home_that_cannot_be_written_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert gpu.writable_home() == {}
    monkeypatch.setenv("HOME", str(tmp_path / "nowhere"))
    assert os.access(gpu.writable_home()["HOME"], os.W_OK)
