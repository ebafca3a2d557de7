"""`make gpu` and `make gpu-tune` from end to end, small, on the stand-in; and killed in the middle."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from primer_fast.bench import keep, models, report
from primer_fast.bench import op as ops
from primer_fast.bench.environment import STAND_IN
from primer_fast.bench.goals import DECLARED
from primer_fast.bench.programs.ppo_step import TRL
from primer_fast.bench.stages import summary
from primer_fast.kernels.tunable import read_tuned

pytestmark = pytest.mark.xdist_group("rehearsal")  # each of them starts many processes


def command(out: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "primer_fast.bench.gpu", "--rehearse", "--out", str(out), *arguments]


MISSING = ("transformers", "trl", "mlxtend", "safetensors", "datasets", "tokenizers")  # on many machines


@pytest.fixture(scope="session")
def environment(tmp_path_factory) -> dict[str, str]:
    """A shell's, without packages that may be missing and without TRITON_INTERPRET, which stages set themselves."""
    folder = tmp_path_factory.mktemp("missing")
    for name in MISSING:
        (folder / f"{name}.py").write_text(f"raise ModuleNotFoundError('No module named {name}', name={name!r})")
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return kept | {"PYTHONPATH": str(folder)}


def run(environment: dict[str, str], out: Path, *arguments: str) -> tuple[Path, str]:
    """The folder that a rehearsal leaves its files in, and what it printed."""
    done = subprocess.run(command(out, *arguments), env=environment, capture_output=True, text=True)
    folder = out / "rehearsal"
    logs = "".join(path.read_text()[-5000:] for path in folder.glob("*.txt"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    return folder, done.stdout


def test_every_stage_ends_and_leaves_its_file(environment, tmp_path):
    folder, printed = run(environment, tmp_path, "--minutes", "18")
    assert {path.name for path in folder.iterdir()} == {
        *("compile.json", "right.json", "fast.json", "programs.json", "sanitizer.json"),
        *(summary.MEASURED.page, summary.MEASURED.log),
    }
    compiled = report.load(folder / "compile.json", report.COMPILE)
    assert {row["what"].split()[0] for row in compiled.rows} >= {*ops.names()}
    checks = report.load(folder / "right.json", report.RIGHT)
    assert {row["op"] for row in checks.rows if row["passed"]} >= {*ops.names()} and not checks.left_out
    assert {row["check"] for row in checks.rows} >= {"values", "graph", "threads", "streams", "bitwise", "layouts"}
    timed = report.load(folder / "fast.json")
    assert {row.op for row in timed.rows if row.status == "ok"} == {*ops.names()} and not timed.left_out
    programs = report.load(folder / "programs.json")
    assert {t.name for t in programs.rows if t.status == report.OK} >= {"gpt2", "dpo", "ppo", "generation"}
    assert set(programs.header["done"]) == set(models.ON_GPU) and not programs.left_out
    assert {subject for subject, _ in DECLARED["cuda"]} <= {t.subject for t in programs.rows}
    missing = {t.provider: t.reason for t in programs.rows if t.status == report.NOT_AVAILABLE}
    assert missing["transformers"] == "not installed: transformers or safetensors" and "trl" in missing[TRL]
    calls = {(t.name, t.setting): t.provider for t in programs.rows if t.subject == "launch" and t.status == report.OK}
    assert len(calls) == 3 * len(ops.names()) + 1, "of each op forward, both ways, and in a step; and GPT-2's step"
    page = (folder / summary.MEASURED.page).read_text()
    assert page.count(": passed, ") == 5 and "Nothing was wrong in what was checked." in page
    assert len(printed) < 12_000 and "## Targets" in printed
    headers = [json.loads(path.read_text())["header"] for path in folder.glob("*.json")]
    assert {header["device"] for header in headers} == {STAND_IN} and len({h["source"] for h in headers}) == 1
    assert keep.main([str(folder)]) == 1, "figures of a stand-in are never kept"


def test_the_search_ends_and_leaves_its_files(environment, tmp_path):
    folder, _ = run(environment, tmp_path, "--only", "tune", "--minutes", "10")
    assert {path.name for path in folder.iterdir()} == {"tune.json", "tuned", *summary.TUNED}
    tried = report.load(folder / "tune.json", report.TUNE)
    assert len(tried.rows) >= 2
    (tuned,) = (folder / "tuned").glob("*.json")
    assert read_tuned(tuned)["settings"]


def test_killed_in_the_middle_the_files_so_far_are_whole(environment, tmp_path):
    """The process and all its children are killed at once."""
    folder = tmp_path / "rehearsal"
    process = subprocess.Popen(
        command(tmp_path, "--only", "right", "fast", "--minutes", "10"), env=environment, start_new_session=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        for _ in range(3000):
            if (folder / "right.json").exists() or process.poll() is not None:
                break
            time.sleep(0.1)
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        for pid in (process.pid, *map(int, children)):
            os.kill(pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert report.load(folder / "right.json", report.RIGHT).rows
    assert (folder / summary.MEASURED.page).read_text().startswith("# ")
    assert (folder / "right.begun").exists(), "the next process would know what this one was at"


def test_the_estimate_counts_what_there_is_to_do(environment):
    asked = [sys.executable, "-m", "primer_fast.bench.gpu", "--estimate"]
    done = subprocess.run(asked, env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["compile", "right", "fast", "programs", "sanitizer"], done.stderr
    launches = int(lines[0].split("s: ")[1].split(" launches")[0].replace(",", ""))
    assert launches > 3 * 608, "the production cases' alone, in three dtypes"
