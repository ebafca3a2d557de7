import json
import os
import signal
import struct
import subprocess
import sys
import textwrap

import matplotlib.image
import pytest
import safetensors.torch
import torch
from cli.conftest import metrics

from primer_fast.cli import run_folder, train_mlp
from primer_fast.cli.run_folder import RunFolder
from primer_fast.functional.activation import ACTIVATIONS
from primer_fast.models.mlp import MLP, MLPConfig
from primer_fast.train import supervised

pytestmark = pytest.mark.usefixtures("plain_path")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def soccer(out):
    """The arguments of a short run on the soccer players: 20 rows of metrics, a checkpoint after each."""
    return ["--data", "soccer", "--out", str(out), "--epochs", "100", "--log-every", "5"]


def test_digits_from_a_folder(digits_folder, out, capsys):
    argv = ["--data", str(digits_folder), "--out", str(out), "--sizes", "36", "24", "10", "--epochs", "60"]
    argv += ["--batch-size", "16", "--log-every", "2", "--augmentation", "none", "--lr", "0.01"]
    assert train_mlp.main(argv) == 0
    rows = metrics(out, times=True)
    assert len(rows) == 120 and rows[-1]["step"] == 240 and rows[-1]["test/accuracy"] == 1.0
    keys = {"step", "epoch", "train/loss", "train/accuracy", "train/grad_norm", "train/learning_rate"}
    keys |= {"train/seconds", "train/samples_per_second"}
    assert set(rows[0]) == keys and set(rows[1]) == keys | {"test/loss", "test/accuracy"}
    for name in ("curves.png", "confusion.png", "mistakes.png"):
        height, width, _ = matplotlib.image.imread(out / name).shape
        assert height > 80 and width > 300
    model = MLP(MLPConfig((36, 24, 10)))
    model.load_state_dict(safetensors.torch.load_file(out / "model.safetensors"))
    options = json.loads((out / "config.json").read_text())["options"]
    assert options["sizes"] == [36, 24, 10] and options["train"]["batch_size"] == 16
    printed = capsys.readouterr().out
    assert "test accuracy 100.00% (30 of 30 digits)" in printed and str(out) in printed


def test_soccer_is_learned_with_the_defaults(out, capsys):
    assert train_mlp.main(["--data", "soccer", "--out", str(out)]) == 0
    assert "40 of 40 players classified right (100.00%)" in capsys.readouterr().out
    assert metrics(out)[-1]["train/accuracy"] == 1.0
    assert {"curves.png", "confusion.png", "surface.png"} <= {file.name for file in out.iterdir()}


def test_resume_is_the_uninterrupted_run(soccer, out, stop_and_resume):
    def add_a_row(run):  # that the checkpoint does not cover
        assert len(metrics(run)) == 10 and not (run / "model.safetensors").exists()
        RunFolder(run, "train mlp").log({"step": 55, "train/loss": 99.0})

    printed = stop_and_resume(train_mlp.main, soccer, 50, signal.SIGINT, add_a_row)
    assert f"stopped at step 50 of 100 and saved in {out}" in printed
    assert "go on with: primer-fast train mlp --data soccer --out" in printed and "--resume" in printed


KILLED = """
import os, signal, sys
from primer_fast.cli import train_mlp
from primer_fast.cli.run_folder import RunFolder
log = RunFolder.log
def log_and_die(self, row):
    log(self, row)
    if row["step"] == 70:
        os.kill(os.getpid(), signal.SIGKILL)
RunFolder.log = log_and_die
sys.exit(train_mlp.main(sys.argv[1:]))
"""


def test_a_killed_run_goes_on_from_its_last_checkpoint(soccer, out, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), *soccer], env=environment)
    assert killed.returncode == -signal.SIGKILL
    assert metrics(out)[-1]["step"] == 70  # written, but the checkpoint is of step 65
    assert train_mlp.main(["--out", str(out), "--resume"]) == 0
    assert train_mlp.main([*soccer[:3], str(tmp_path / "whole"), *soccer[4:]]) == 0
    assert metrics(out) == metrics(tmp_path / "whole")


def test_a_run_killed_before_its_first_checkpoint_starts_again(soccer, out):
    assert train_mlp.main(soccer) == 0
    want = metrics(out)
    for name in ("checkpoint.safetensors", "model.safetensors"):
        (out / name).unlink()
    assert train_mlp.main(["--out", str(out), "--resume"]) == 0
    assert metrics(out) == want


def test_a_second_interruption_ends_at_once(soccer, out, monkeypatch, capsys):
    log = RunFolder.log

    def interrupt_twice(self, row):
        log(self, row)
        if row["step"] == 50:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(RunFolder, "log", interrupt_twice)
    assert train_mlp.main(soccer) == 130
    assert "interrupted" in capsys.readouterr().err
    _, metadata = run_folder.read_safetensors(out / "checkpoint.safetensors")
    assert json.loads(metadata["progress"])["step"] == 45  # of the row before
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_finished_run_resumes_to_itself(soccer, out):
    assert train_mlp.main(soccer) == 0
    before = metrics(out, times=True)
    assert train_mlp.main(["--data", "soccer", "--out", str(out), "--resume"]) == 0
    assert metrics(out, times=True) == before


def test_cuda_graphs_on_a_cpu_are_a_warning(soccer, out):
    with pytest.warns(RuntimeWarning, match="supervised: no CUDA graph"):
        assert train_mlp.main([*soccer, "--cuda-graphs", "True", "--device", "cpu"]) == 0
    assert '"cuda_graphs": true' in (out / "config.json").read_text()


def test_divergence_ends_with_the_last_checkpoint_kept(soccer, out, monkeypatch, capsys):
    step = supervised.train_step

    def nan_in_step_53(state, x, *rest):
        step(state, x * float("nan") if state.step == 52 else x, *rest)

    monkeypatch.setattr(supervised, "train_step", nan_in_step_53)
    assert train_mlp.main(soccer) == 1
    message = capsys.readouterr().err
    assert "primer-fast train mlp: supervised: the loss is not finite at step 53" in message
    assert f"the checkpoint in {out} is of an earlier step and kept" in message
    assert metrics(out)[-1]["step"] == 50 and not (out / "model.safetensors").exists()
    tensors, metadata = run_folder.read_safetensors(out / "checkpoint.safetensors")
    assert json.loads(metadata["progress"])["step"] == 50
    assert all(t.isfinite().all() for name, t in tensors.items() if name.startswith("model."))


def test_the_same_model_from_torch_is_trained_beside(soccer, out, capsys):
    assert train_mlp.main([*soccer, "--compare-torch"]) == 0
    printed = capsys.readouterr().out
    assert "seconds per epoch, median of 20, trained in turns of 5 steps" in printed and "torch.nn" in printed
    assert "train/loss at most" in printed
    apart = float(printed.split("train/loss at most ")[1].split()[0])
    assert apart < 1e-5


def test_every_activation_has_its_twin():
    from primer_fast.bench.torch_twin import torch_twin

    x = torch.randn(5, 3)
    for activation in (None, *ACTIVATIONS):
        model = MLP(MLPConfig((3, 4, 2), activation))
        torch.testing.assert_close(torch_twin(model)(x), model(x))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision(soccer, out, precision):
    assert train_mlp.main([*soccer, "--precision", precision]) == 0
    assert metrics(out)[-1]["train/loss"] < metrics(out)[0]["train/loss"]


# Wrong calls: each ends with status 2 and one line that says what to change


CALLS = {
    "no folder": (["--data", "nowhere"], "nowhere: no such folder"),
    "sizes": (
        ["--data", "soccer", "--sizes", "3", "1"],
        "--sizes must begin with 2 and end with 1 for this data; got 3 1",
    ),
    "one size": (["--data", "soccer", "--sizes", "2"], "MLP: sizes must be two or more positive integers; got [2]"),
    "no size": (["--data", "soccer", "--sizes"], "MLP: sizes must be two or more positive integers; got []"),
    "negative size": (["--data", "soccer", "--sizes", "2", "-3", "1"], "MLP: sizes must be two or more positive"),
    "activation": (["--data", "soccer", "--activation", "swoosh"], "MLP: activation must be None or one of relu"),
    "loss": (["--data", "soccer", "--loss", "cross_entropy"], "--loss must be binary_cross_entropy for this data"),
    "lr": (["--data", "soccer", "--lr", "-1"], "lr must be positive and finite; got -1.0"),
    "augmentation": (["--data", "soccer", "--augmentation", "shift"], "Shift: images must be (N, H, W); got (40, 2)"),
    "resume what": (["--resume"], "--resume needs --out, or --data, to know which run to go on with"),
    "resume nothing": (["--data", "soccer", "--resume"], "no such folder, so there is no run to go on with"),
    "both": (["--data", "soccer", "--resume", "--overwrite"], "no such folder, so there is no run"),
}


@pytest.mark.parametrize("call", CALLS)
def test_wrong_call(call, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv, message = CALLS[call]
    assert train_mlp.main(argv) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "--data"),
        (["--data", "soccer", "--optimizer", "lion"], "lion"),
        (["--data", "soccer", "--epochs", "many"], "many"),
        (["--data", "soccer", "--speed", "9"], "--speed"),
        (["--data"], "--data"),
    ],
)
def test_wrong_option(argv, message, capsys):
    assert train_mlp.main(argv) == 2
    captured = capsys.readouterr()
    assert message in captured.err + captured.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu(soccer, capsys):
    assert train_mlp.main([*soccer, "--device", "cuda"]) == 2
    assert "--device cuda: torch finds no GPU on this machine" in capsys.readouterr().err


def test_help_lists_the_options(capsys):
    assert train_mlp.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(option in printed for option in ("--data", "--resume", "--sizes", "--compare-torch", "--lr", "--seed"))


def test_a_damaged_data_file_is_named(digits_folder, out, capsys):
    path = digits_folder / "train-images-idx3-ubyte"
    path.write_bytes(struct.pack(">4B3I", 0, 0, 8, 3, 60, 6, 6) + b"\0" * 10)
    assert train_mlp.main(["--data", str(digits_folder), "--out", str(out)]) == 2
    assert f"{path}: truncated" in capsys.readouterr().err and not out.exists()


@pytest.fixture
def stopped(soccer, out):
    """A run with a checkpoint, and the arguments to go on with it."""
    assert train_mlp.main(soccer) == 0
    return ["--out", str(out), "--resume"]


def test_a_run_is_not_overwritten(stopped, soccer, capsys):
    assert train_mlp.main(soccer) == 2
    assert "holds a finished run; --resume goes on with it, --overwrite starts anew" in capsys.readouterr().err
    assert train_mlp.main([*soccer, "--overwrite", "--seed", "1"]) == 0


def test_a_resumed_run_keeps_its_options(stopped, capsys):
    assert train_mlp.main([*stopped, "--lr", "2", "--seed", "7"]) == 2
    assert "the run was begun with lr 0.5 (now 2.0), seed 0 (now 7); leave them out" in capsys.readouterr().err
    assert train_mlp.main([*stopped, "--compare-torch"]) == 2
    assert train_mlp.main([*stopped, "--overwrite"]) == 2
    assert "exclude each other" in capsys.readouterr().err


def other_model(path):
    tensors, metadata = run_folder.read_safetensors(path)
    tensors["model.layers.0.weight"] = torch.zeros(7, 2)
    safetensors.torch.save_file(tensors, path, metadata)


CHECKPOINTS = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-7]), "not a safetensors file, or a truncated or"),
    "random": (
        lambda path: path.write_bytes(os.urandom(4096)),
        "not a safetensors file, or a truncated or damaged one",
    ),
    "foreign": (
        lambda path: safetensors.torch.save_file({"weight": torch.zeros(3)}, path),
        "not a checkpoint of this version: format must be",
    ),
    "other model": (other_model, "made from another model: its layers.0.weight is (7, 2)"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_corrupt_checkpoint_is_named(stopped, out, name, capsys):
    damage, message = CHECKPOINTS[name]
    damage(out / "checkpoint.safetensors")
    assert train_mlp.main(stopped) == 2
    error = capsys.readouterr().err
    assert f"{out / 'checkpoint.safetensors'}: " in error and message in error


@pytest.mark.parametrize("options", [{}, {"data": "soccer"}, {"data": "soccer", "train": {"pace": 3}}], ids=str)
def test_a_config_of_something_else_is_named(stopped, out, options, capsys):
    content = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(content | {"options": options}))
    assert train_mlp.main(stopped) == 2
    assert f"{out / 'config.json'}: not the configuration of this command" in capsys.readouterr().err
