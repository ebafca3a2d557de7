import json
import math
import os
import signal
import sys
import time
from dataclasses import replace

import pytest
import torch

from primer_fast.bench import gpu, summary
from primer_fast.bench.gpu import Outcome, Stage, run_all, run_stage
from primer_fast.proof import verify

HEADER = {
    "device": "A GPU",
    "commit": None,
    "date": "2026-01-02",
    **dict.fromkeys(("python", "torch", "triton", "cuda"), "1"),
}
HEADER["driver"] = None


def stage(code, name="tests", share=0.5):
    return Stage(name, share, lambda seconds: [sys.executable, "-c", code])


def test_goes_on_past_a_failure_and_a_timeout(tmp_path):
    todo = [
        stage("print('one'); raise SystemExit(3)", "tests"),
        stage("import time; print('two', flush=True); time.sleep(60)", "verify", share=0.1),
        stage("print('three')", "bench"),
    ]
    begin = time.monotonic()
    outcomes = run_all(todo, tmp_path, 30, HEADER)
    assert time.monotonic() - begin < 20
    assert [o.name for o in outcomes] == ["tests", "verify", "bench"]
    assert outcomes[0].status == "failed (exit 3)"
    assert outcomes[1].status.startswith("stopped after ")
    assert outcomes[2].passed
    assert [(tmp_path / f"{n}.log").read_text().split()[0] for n in ("tests", "verify", "bench")] == [
        "one",
        "two",
        "three",
    ]
    page = (tmp_path / "summary.md").read_text()
    assert "- tests: failed (exit 3)" in page
    assert "- verify: stopped after " in page
    assert "- bench: passed" in page


def test_a_stage_is_given_its_limit(tmp_path):
    seen = []
    todo = [
        Stage("tests", 0.25, lambda seconds: seen.append(seconds) or [sys.executable, "-c", ""]),
        Stage("bench", 1.0, lambda seconds: seen.append(seconds) or [sys.executable, "-c", ""]),
    ]
    run_all(todo, tmp_path, 100, HEADER)
    assert seen[0] == pytest.approx(0.25 * 90, abs=1)  # a tenth is kept for the end
    assert 80 < seen[1] < 90  # what the tests did not use is the benchmarks'


def test_what_a_stopped_stage_started_is_stopped_too(tmp_path):
    child = "import time; time.sleep(60)"
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"  # will not listen
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)"
    )
    begin = time.monotonic()
    outcome = run_stage(stage(code), tmp_path / "tests.log", limit=3, grace=0.5)
    assert outcome.status == "stopped after 3 s"
    assert time.monotonic() - begin < 10
    pid = int((tmp_path / "tests.log").read_text())
    for _ in range(50):
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


def test_an_interrupted_stage_can_still_write(tmp_path):
    """Even where this process ignores SIGINT, as what a shell runs in its background does."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        _interrupted_stage_writes(tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupted_stage_writes(tmp_path):
    code = "import time\ntry:\n  time.sleep(60)\nexcept KeyboardInterrupt:\n  print('saved')"
    run_stage(stage(code), tmp_path / "tests.log", limit=2)
    assert (tmp_path / "tests.log").read_text() == "saved\n"


def test_a_stage_has_its_environment(tmp_path):
    code = "import os; print(os.environ['TRITON_INTERPRET'], 'PATH' in os.environ)"
    interpreted = replace(stage(code), environment={"TRITON_INTERPRET": "1"})
    assert run_stage(interpreted, tmp_path / "tests.log", 10).passed
    assert (tmp_path / "tests.log").read_text() == "1 True\n"


def test_a_stage_that_leaves_nothing_has_not_passed(tmp_path):
    silent = replace(stage(""), leaves=tmp_path / "tests.xml")
    assert run_stage(silent, tmp_path / "tests.log", 10).status == "failed (exit 0, but no tests.xml)"
    (tmp_path / "tests.xml").touch()
    assert run_stage(silent, tmp_path / "tests.log", 10).passed


def test_a_command_that_is_not_there(tmp_path):
    outcome = run_stage(Stage("tests", 1, lambda seconds: ["/no/such/program"]), tmp_path / "tests.log", 5)
    assert outcome.status.startswith("not started: ")


def test_a_long_log_keeps_both_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LOG_BYTES", 1000)
    log = tmp_path / "tests.log"
    log.write_text("begin" + "x" * 5000 + "end")
    gpu._shorten(log)
    text = log.read_text()
    assert len(text) < 1100
    assert text.startswith("begin")
    assert text.endswith("end")
    assert "shortened" in text


def test_the_real_commands(tmp_path):
    stages = gpu.stages(tmp_path, ["-k", "some"], interpreted=True)
    commands = {s.name: s.command(100) for s in stages}
    assert commands["tests"][2:5] == ["-m", "pytest", "tests"]
    assert commands["tests"][-2:] == ["-k", "some"]
    assert commands["verify"][2:4] == ["-m", "primer_fast.proof.verify"]
    assert commands["bench"][-2:] == ["--budget", "80"]
    assert [s.name for s in stages if "TRITON_INTERPRET" in s.environment] == ["tests", "verify"]
    assert commands["tune"][2:] == ["-m", "primer_fast.tuning", "--out", str(tmp_path / "tuned"), "--minutes", "1.33"]
    assert {s.leaves.name for s in stages if s.leaves} < set(summary.FILES)
    assert not any(s.environment for s in gpu.stages(tmp_path, [], interpreted=False))
    assert (gpu.ROOT / "bench" / "gpu.py").is_file()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("code", "status"), [("", 0), ("raise SystemExit(1)", 1)])
def test_exit_status_and_the_page_printed_last(tmp_path, monkeypatch, capsys, code, status):
    monkeypatch.setattr(gpu, "stages", lambda *_: [stage(""), stage(code, "bench")])
    (tmp_path / "bench.json").write_text("an older run's")
    assert gpu.main(["--out", str(tmp_path), "--minutes", "0.5", "--cpu"]) == status
    assert not (tmp_path / "bench.json").exists()
    printed = capsys.readouterr().out
    assert f"- bench: {'passed' if status == 0 else 'failed (exit 1)'}" in printed.split("# ", 1)[1]
    assert {p.name for p in tmp_path.iterdir()} <= set(summary.FILES)
    assert len(summary.FILES) <= 8


def test_one_stage_has_all_the_time(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(gpu, "run_all", lambda todo, *_: ran.extend(todo) or [])
    assert gpu.main(["--out", str(tmp_path), "--cpu", "--only", "verify"]) == 0
    assert [(s.name, s.share) for s in ran] == [("verify", 1.0)]
    ran.clear()
    assert gpu.main(["--out", str(tmp_path), "--cpu", "--only", "tune"]) == 0
    assert [(s.name, s.share) for s in ran] == [("tune", 1.0)]
    ran.clear()
    assert gpu.main(["--out", str(tmp_path), "--cpu"]) == 0
    assert [s.name for s in ran] == ["tests", "verify", "bench"], "the search is asked for"
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), "--cpu", "--only", "nothing"])


class TestSummary:
    OUTCOMES = (
        Outcome("tests", "failed (exit 1)", 30.0),
        Outcome("verify", "passed", 3.0),
        Outcome("bench", "passed", 9.0),
    )

    def write(self, out, failures=1, rows=3):
        cases = "".join(
            f'<testcase classname="tests.test_a" name="test_{i}"><failure message="assert {i} == 0&#10;b"/></testcase>'
            for i in range(failures)
        )
        skipped = '<testcase classname="c" name="s"><skipped message="no"/></testcase>'
        passed = '<testcase classname="c" name="p"/>'
        (out / "tests.xml").write_text(f"<testsuites><testsuite>{cases}{skipped}{passed}</testsuite></testsuites>")
        verified = [
            verify.Row("linear", f"case{i}", "float32", "pointers", "input", i * 1e-7, 1e-4, 1e-7).as_dict()
            for i in range(rows)
        ]
        (out / "verify.json").write_text(json.dumps(verified))

    def test_failures_by_name_and_the_worst_first(self, tmp_path):
        self.write(tmp_path)
        page = summary.text(tmp_path, HEADER, self.OUTCOMES)
        assert "1 passed, 1 failed, 0 errors, 1 skipped" in page
        assert "- tests.test_a::test_0: assert 0 == 0\n" in page
        assert page.index("case2 float32 pointers input: error 2.00e-07, budget 1.00e-04") < page.index(
            "case1 float32 pointers input"
        )
        assert "No rows" in page  # bench.json is not there

    def test_a_failed_verification_comes_before_any_other(self, tmp_path):
        rows = [
            {"op": "linear", "case": "near", "dtype": "float32", "error": 0.99, "budget": 1.0, "passed": True},
            {"op": "linear", "case": "over", "dtype": "float32", "error": 2.0, "budget": 1.0, "passed": False},
            {"op": "linear", "case": "unknown", "dtype": "float32", "error": math.nan, "budget": 1.0, "passed": False},
            {"op": "linear", "case": "crashed", "dtype": "float32", "error": None, "budget": 1.0, "passed": False},
        ]
        (tmp_path / "verify.json").write_text(json.dumps(rows))
        page = summary.text(tmp_path, HEADER, self.OUTCOMES)
        order = ["FAILED linear unknown float32: error nan", "FAILED linear crashed float32: error -"]
        order += ["FAILED linear over", "ok linear near"]
        assert [page.index(line) for line in order] == sorted(page.index(line) for line in order)

    def test_brief_is_short_whatever_happened(self, tmp_path):
        self.write(tmp_path, failures=500, rows=2000)
        for name in ("tests", "verify", "bench"):
            (tmp_path / f"{name}.log").write_text("y" * 50_000 + "\n" * 3)
        assert len(summary.text(tmp_path, HEADER, self.OUTCOMES, brief=True)) < 10_000
        assert summary.text(tmp_path, HEADER, self.OUTCOMES).count("tests.test_a::") == 500

    def test_counts_of_killed_tests_come_from_the_log(self, tmp_path):
        lines = ["x PASSED [ 1%]", "y[a b] FAILED [ 2%]", "z SKIPPED (no) [ 3%]", "killed "]
        (tmp_path / "tests.log").write_text("\n".join(f"t/a.py::{line}" for line in lines))
        counts, failures = summary.test_counts(tmp_path)
        assert counts == {"passed": 1, "failed": 1, "errors": 0, "skipped": 1}
        assert failures == ["t/a.py::y[a b]: see tests.log"]

    def test_cases_of_a_killed_verification_come_from_the_log(self, tmp_path):
        (tmp_path / "verify.log").write_text("ok     linear a\nFAILED linear b\nok     linear c\nTraceback")
        page = summary.text(tmp_path, HEADER, self.OUTCOMES)
        assert "2 cases passed, 1 failed.\n- FAILED linear b\n" in page

    def test_damaged_files_are_named_not_fatal(self, tmp_path):
        for name in ("tests.xml", "verify.json", "bench.json"):
            (tmp_path / name).write_text("{")
        (tmp_path / "verify.log").write_text("Traceback\nValueError: why")
        page = summary.text(tmp_path, HEADER, self.OUTCOMES)
        assert "    ValueError: why" in page
        assert "tests.log was not written" in page
