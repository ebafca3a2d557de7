"""The commands that train in two processes: what they write, who prints, resume by another number, one end for both."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest
import safetensors.torch
import torch

from primer_fast.cli import checkpoint, sample, train_gpt, train_mlp, usage
from primer_fast.cli.run_folder import RunFolder, read_safetensors

pytestmark = [pytest.mark.xdist_group("distributed"), pytest.mark.usefixtures("plain_path")]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "primer_fast.cli"]
# Without biases, as in tests/train/distributed_cases.py.
GPT = [
    "--data", "text.txt", "--steps", "8", "--batch-size", "5", "--accumulate", "2", "--context", "16", "--width", "16",
    "--layers", "2", "--heads", "2", "--no-bias", "--log-every", "1", "--eval-every", "4", "--eval-batches", "2",
    "--warmup-steps", "2", "--sample-tokens", "5",
]  # fmt: skip


def environment(**more):
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return clean | {"OMP_NUM_THREADS": "1", **more}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    lines = [f"the quick brown fox {i * i} jumps over the lazy dog {i}\n" for i in range(60)]
    (folder / "text.txt").write_text("".join(lines))
    return folder


@pytest.fixture
def one(folder, monkeypatch):
    """The run of one process, made once."""
    monkeypatch.chdir(folder)
    if not (folder / "one" / "sample.txt").exists():
        assert train_gpt.main([*GPT, "--out", "one"]) == 0
    return folder / "one"


def stop_at(step, monkeypatch):
    """Make a run of this process stop as after Ctrl-C."""
    asked = iter(range(1000))
    monkeypatch.setattr("primer_fast.cli.interruption.Interruption.requested", lambda self: next(asked) >= step)


@pytest.fixture(scope="module")
def fsdp(folder):
    """A finished run of two processes that torchrun started."""
    command = [*TORCHRUN, "train", "gpt", *GPT, "--out", "fsdp", "--strategy", "fsdp"]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)


def test_two_processes_of_torchrun_write_the_run_of_one(folder, one, fsdp):
    assert fsdp.returncode == 0, fsdp.stderr
    assert_same_run(folder / "fsdp", one)
    names = {path.name for path in one.iterdir()} - {"checkpoint.safetensors"} | {"checkpoint-8"}
    assert {path.name for path in (folder / "fsdp").iterdir()} == names


def test_only_the_first_process_prints(fsdp):
    lines = fsdp.stdout.splitlines()
    assert sum(line.startswith("gpt on text 8/8 ") for line in lines) == 1
    assert sum(line.startswith("step 8: validation loss ") for line in lines) == 1
    assert sum(line.startswith("validation loss ") for line in lines) == 1
    assert fsdp.stderr.strip() == ""


@pytest.mark.parametrize("processes", [1, 2])
def test_only_a_process_on_its_own_shuts_python_down(tmp_path, processes):
    """Beside others it may have threads of gloo, which can abort the process during Python's shutdown."""
    (tmp_path / "sitecustomize.py").write_text("import atexit\natexit.register(print, 'shut down')\n")
    env = environment(WORLD_SIZE=str(processes), PYTHONPATH=str(tmp_path))
    done = subprocess.run([sys.executable, "-m", "primer_fast.cli"], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == usage() + "\n" + (processes == 1) * "shut down\n"


PAIR = """
import os, sys
from primer_fast.cli import train_gpt, interruption
first, port, argv = int(os.environ["RANK"]) == 0, int(os.environ["MASTER_PORT"]), sys.argv[1:]
def stops_at(step):  # asked for in the second process alone
    asked = iter(range(1000))
    interruption.Interruption.requested = lambda self: next(asked) >= step and not first
codes = []
for number, (strategy, step, *more) in enumerate([
    ("fsdp", 3, "--out", "fsdp-begun"), ("ddp", 3, "--out", "ddp-begun"),
    ("ddp", 99, "--out", "one-begun", "--resume"),
    ("fsdp", 2, "--out", "changing", "--resume"), ("ddp", 99, "--out", "changing", "--resume"),
]):
    os.environ["MASTER_PORT"] = os.environ["PORTS"].split()[number]
    stops_at(step)
    begins = [] if "--resume" in more else argv
    codes.append(train_gpt.main([*begins, "--strategy", strategy, *more]))
sys.exit(codes != [130, 130, 0, 130, 0] and repr(codes))
"""


@pytest.fixture
def begun(folder, one, monkeypatch):
    """Runs that two processes began, and runs that one began and two finished; made once."""
    if not (folder / "fsdp-begun").exists():
        with monkeypatch.context() as patch:
            for name in ("one-begun", "changing"):
                stop_at(3, patch)
                assert train_gpt.main([*GPT, "--out", name]) == 130
        ports = " ".join(free_port() for _ in range(5))
        common = environment(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="0", PORTS=ports)
        command = [sys.executable, "-c", textwrap.dedent(PAIR), *GPT]
        pair = [subprocess.Popen(command, cwd=folder, env=common | {"RANK": r, "LOCAL_RANK": r}) for r in "01"]
        try:
            assert [process.wait() for process in pair] == [0, 0]
        finally:
            for process in pair:
                process.kill()
    return folder


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_one_process_goes_on_with_a_run_of_two(begun, one, strategy):
    run = begun / f"{strategy}-begun"
    assert sample.main([str(run), "--tokens", "5"]) == 0  # of what was learned so far
    assert metrics(run)[-1]["step"] == 3 and (run / "checkpoint-3").exists() == (strategy == "fsdp")
    assert train_gpt.main(["--out", str(run), "--resume"]) == 0
    assert_same_run(run, one)
    assert (run / "checkpoint.safetensors").exists() and not (run / "checkpoint-3").exists()


@pytest.mark.parametrize("name", ["one-begun", "changing"])
def test_two_processes_go_on_with_a_run_of_one(begun, one, name):
    """DDP does, or FSDP for two steps and then DDP."""
    run = begun / name
    assert_same_run(run, one)
    assert (run / "checkpoint.safetensors").exists() and not list(run.glob("checkpoint-*"))


def test_a_new_run_removes_the_sharded_checkpoint_of_before(folder, fsdp, monkeypatch):
    monkeypatch.chdir(folder)
    stop_at(1, monkeypatch)
    assert train_gpt.main([*GPT, "--out", "fsdp", "--overwrite"]) == 130
    assert not list((folder / "fsdp").glob("checkpoint-*"))


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


FAILING = """
import os, sys, time
from primer_fast.cli import train_mlp
from primer_fast.train import supervised
step = supervised.train_step
def fails(state, *args):
    if state.step == 2:
        if os.environ["RANK"] == "1":
            raise RuntimeError("out of something")
        time.sleep(1000)
    return step(state, *args)
supervised.train_step = fails
sys.exit(train_mlp.main(sys.argv[1:]))
"""


def test_an_error_in_one_process_ends_the_other(tmp_path):
    """Without torchrun, which would end it too; sleep stands for a sum on a GPU that never comes."""
    common = environment(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    command = [sys.executable, "-c", FAILING, "--data", "soccer", "--out", str(tmp_path / "run")]
    pair = [
        subprocess.Popen(command, env=common | {"RANK": r, "LOCAL_RANK": r}, stderr=subprocess.PIPE, text=True)
        for r in "01"
    ]
    try:
        said = [process.communicate()[1] for process in pair]
    finally:
        for process in pair:
            process.kill()
    assert [process.returncode for process in pair] == [1, 1]
    assert said[1].rstrip().endswith("RuntimeError: out of something") and "Error" not in said[0]


def test_a_wrong_call_is_reported_once(folder, one):
    command = [*TORCHRUN, "train", "gpt", *GPT, "--out", "one"]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode != 0 and done.stderr.count("one: holds a finished run; --resume goes on with it") == 1


def test_a_signal_to_torchrun_and_to_a_process_stops_all_and_saves(folder, one, monkeypatch):
    """SLURM signals both; torchrun hands its own on, so that one process has it once and the other twice."""
    options = [*GPT, "--steps", "100000", "--eval-every", "100000", "--out", "long"]
    process = subprocess.Popen([*TORCHRUN, "train", "gpt", *options], cwd=folder, env=environment())
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
    metadata = safetensors.safe_open(folder / "long" / "checkpoint.safetensors", "pt").metadata()
    assert json.loads(metadata["progress"])["step"] == metrics(folder / "long")[-1]["step"] >= 3


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_strategy_needs_processes(tmp_path, capsys, strategy):
    assert train_mlp.main(["--data", "soccer", "--out", str(tmp_path / "run"), "--strategy", strategy]) == 2
    assert f"--strategy {strategy} is for processes that torchrun starts" in capsys.readouterr().err


def test_several_processes_need_a_strategy(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train_mlp.main(["--data", "soccer", "--out", str(tmp_path / "run"), "--strategy", "none"]) == 2
    assert "--strategy none is for one process; ddp or fsdp for the 2" in capsys.readouterr().err
