"""The commands that train in two processes: what they write, who prints, resume by another number, one end for both."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cli.commands import metrics, saved_step

from primer_fast.cli import main, sample, usage
from primer_fast.cli.run import checkpoint
from primer_fast.cli.run.folder import RunFolder, read_safetensors

pytestmark = [pytest.mark.xdist_group("distributed"), pytest.mark.usefixtures("plain_path")]
# Without biases, as in tests/train/distributed_cases.py.
GPT = [
    "train", "gpt", "--data", "text.txt", "--steps", "8", "--batch-size", "5", "--accumulate", "2", "--context", "16",
    "--width", "16", "--layers", "2", "--heads", "2", "--no-bias", "--log-every", "1", "--eval-every", "4",
    "--eval-batches", "2", "--warmup-steps", "2", "--sample-tokens", "5",
]  # fmt: skip
RESUME = ["train", "gpt", "--resume"]
CALLS = {  # words, after how many steps the second process is asked to stop, its trouble -> statuses
    "whole": ([*GPT, "--strategy", "fsdp", "--out", "fsdp"], None, None, [0, 0]),
    "wrong": ([*GPT, "--out", "one"], None, None, [2, 2]),
    "wrong, one late": ([*GPT, "--out", "one"], None, "late", [2, 2]),
    "fsdp begins": ([*GPT, "--strategy", "fsdp", "--out", "fsdp-begun"], 3, None, [130, 130]),
    "ddp begins": ([*GPT, "--out", "ddp-begun"], 3, None, [130, 130]),
    "ddp ends": ([*RESUME, "--out", "one-begun"], None, None, [0, 0]),
    "fsdp goes on": ([*RESUME, "--strategy", "fsdp", "--out", "changing"], 2, None, [130, 130]),
    "ddp goes on": ([*RESUME, "--out", "changing"], None, None, [0, 0]),
    "error": (["train", "mlp", "--data", "soccer", "--out", "failing"], None, "error", [1, 1]),
}


def environment(**more):
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return clean | {"OMP_NUM_THREADS": "1", **more}


def assert_same_run(folder, other):
    """Metrics, weights, and the sample that is drawn from these."""
    rows, other_rows = metrics(folder), metrics(other)
    assert len(rows) == len(other_rows) > 0
    for row, other_row in zip(rows, other_rows, strict=True):
        assert row == pytest.approx(other_row, rel=1e-5, abs=1e-6)
    weights, others = (read_safetensors(f / "model.safetensors")[0] for f in (folder, other))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], rtol=1e-4, atol=2e-5)
    assert (folder / "sample.txt").read_text() == (other / "sample.txt").read_text()


def stop_at(step, monkeypatch):
    """Make a run of this process stop as after Ctrl-C."""
    asked = iter(range(1000))
    monkeypatch.setattr("primer_fast.cli.interruption.Interruption.requested", lambda self: next(asked) >= step)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def folder(made, monkeypatch):
    """The current folder, with the run ``one`` of one process and what both processes of each of CALLS did."""
    monkeypatch.chdir(made)
    if not (made / "said.json").exists():
        lines = [f"the quick brown fox {i * i} jumps over the lazy dog {i}\n" for i in range(60)]
        Path("text.txt").write_text("".join(lines))
        assert main([*GPT, "--out", "one"]) == 0
        for name in ("one-begun", "changing"):
            with monkeypatch.context() as patch:
                stop_at(3, patch)
                assert main([*GPT, "--out", name]) == 130
        calls = json.dumps([call[:3] for call in CALLS.values()])
        command = [sys.executable, Path(__file__).with_name("pair.py"), calls]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        Path("said.json").write_text(json.dumps(dict(zip(CALLS, json.loads(done.stdout), strict=True))))
    return made


@pytest.fixture
def said(folder):
    """By name of a call: the statuses, the outputs and the errors of its two processes."""
    return json.loads(Path("said.json").read_text())


@pytest.mark.parametrize("name", CALLS)
def test_both_processes_end_with_one_status_and_only_the_first_prints(name, said):
    statuses, outputs, errors = said[name]
    assert statuses == CALLS[name][3], errors
    assert outputs[1] == "", "the second says nothing"
    if name == "error":  # without torchrun, which would end the first too
        assert errors[1].rstrip().endswith("RuntimeError: out of something") and "Error" not in errors[0]
    elif name.startswith("wrong"):
        assert "".join(errors).count("one: holds a finished run; --resume goes on with it") == 1
    else:
        assert errors == ["", ""]


def test_two_processes_write_the_run_of_one(folder, said):
    assert_same_run(folder / "fsdp", folder / "one")
    names = {path.name for path in Path("one").iterdir()} - {"checkpoint.safetensors"} | {"checkpoint-8"}
    assert {path.name for path in Path("fsdp").iterdir()} == names
    lines = said["whole"][1][0].splitlines()
    for start in ("gpt on text 8/8 ", "step 8: validation loss ", "validation loss "):
        assert sum(line.startswith(start) for line in lines) == 1, start


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_one_process_goes_on_with_a_run_of_two(folder, strategy):
    run = folder / f"{strategy}-begun"
    assert sample.main([str(run), "--tokens", "5"]) == 0  # of what was learned so far
    assert metrics(run)[-1]["step"] == 3 and (run / "checkpoint-3").exists() == (strategy == "fsdp")
    assert main([*RESUME, "--out", str(run)]) == 0
    assert_same_run(run, folder / "one")
    assert (run / "checkpoint.safetensors").exists() and not (run / "checkpoint-3").exists()


@pytest.mark.parametrize("name", ["one-begun", "changing"])
def test_two_processes_go_on_with_a_run_of_one(folder, name):
    """DDP does, or FSDP for two steps and then DDP."""
    run = folder / name
    assert_same_run(run, folder / "one")
    assert (run / "checkpoint.safetensors").exists() and not list(run.glob("checkpoint-*"))


def test_a_new_run_removes_the_sharded_checkpoint_of_before(folder, monkeypatch):
    shutil.copytree("fsdp", "again")
    stop_at(1, monkeypatch)
    assert main([*GPT, "--out", "again", "--overwrite"]) == 130
    assert not list(Path("again").glob("checkpoint-*"))


def test_the_later_of_two_checkpoints_is_the_last(tmp_path):
    """A run that is killed between writing one and removing the other has both."""
    run = RunFolder(tmp_path, "train gpt")
    assert checkpoint.last(run) is None
    for step in (8, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert checkpoint.last(run) == tmp_path / "checkpoint-12"
    run.checkpoint.write_bytes(b"")
    for seconds, want in ((1, run.checkpoint), (-1, tmp_path / "checkpoint-12")):
        os.utime(run.checkpoint, (2e9 + seconds, 2e9 + seconds))
        os.utime(tmp_path / "checkpoint-12", (2e9, 2e9))
        assert checkpoint.last(run) == want


@pytest.mark.parametrize("processes", [1, 2])
def test_only_a_process_on_its_own_shuts_python_down(tmp_path, processes):
    """Beside others it may have threads of gloo, which can abort the process during Python's shutdown."""
    (tmp_path / "sitecustomize.py").write_text("import atexit\natexit.register(print, 'shut down')\n")
    env = environment(WORLD_SIZE=str(processes), PYTHONPATH=str(tmp_path))
    done = subprocess.run([sys.executable, "-m", "primer_fast.cli"], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == usage() + "\n" + (processes == 1) * "shut down\n"


def test_a_signal_to_torchrun_and_to_a_process_stops_all_and_saves(folder):
    """SLURM signals both; torchrun hands its own on, so that one process has it once and the other twice."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "primer_fast.cli"]
    options = [*GPT, "--steps", "100000", "--eval-every", "100000", "--out", "long"]
    process = subprocess.Popen([*torchrun, *options], env=environment())
    try:
        rows = folder / "long" / "metrics.jsonl"
        while not (rows.exists() and rows.read_text().count("\n") > 3) and process.poll() is None:
            time.sleep(0.1)
        first = (folder / "long" / ".lock").read_text().split()[1]
        os.kill(int(first), signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        process.wait()
    finally:
        process.kill()
    assert saved_step("long") == metrics("long")[-1]["step"] >= 3
