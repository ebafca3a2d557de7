"""A gradient that becomes NaN: every procedure stops, says at which step, and keeps the last good checkpoint."""

import json
import os
import shutil

import pytest
import safetensors.torch
import torch
from cli import soak

from primer_fast.cli import main
from primer_fast.cli.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("plain_path")
FAULT = 5  # the optimizer step whose gradient is NaN
SETTINGS = {name: soak.SETTINGS[name] for name in ("gpt", "dpo", "ppo")} | {
    "mlp": "train mlp --data soccer --epochs 12 --log-every 1",
    "sft": "train sft --data pairs.jsonl --model base --steps 12 --batch-size 8 --log-every 1",
    "reward": "train reward --data pairs.jsonl --model base --steps 12 --batch-size 8 --log-every 1",
}
FIRST_BAD = {"ppo": 2}  # of a rollout's two passes of two minibatches
NAMES = {"mlp": "supervised", "gpt": "language_model"}


@pytest.fixture
def folder(base_folder, monkeypatch):
    from primer_fast.cli import cnn_plots, gpt_plots, plots, preference_plots

    for module in (plots, gpt_plots, cnn_plots, preference_plots):
        for name in soak.PICTURES:
            monkeypatch.setattr(module, name, lambda *_, **__: None, raising=False)
    monkeypatch.chdir(base_folder)
    monkeypatch.syspath_prepend(str(base_folder))
    monkeypatch.delitem(__import__("sys").modules, "rewards", raising=False)
    yield base_folder
    for name in ("run", "whole"):
        shutil.rmtree(base_folder / name, ignore_errors=True)


def spoil(monkeypatch):
    """One gradient is NaN at an optimizer step, as where a loss overflows."""
    norm, calls = torch.nn.utils.get_total_norm, []

    def spoilt(grads, *args, **kwargs):
        calls.append(1)
        if len(calls) == FAULT:
            grads[0].fill_(float("nan"))
        return norm(grads, *args, **kwargs)

    monkeypatch.setattr(torch.nn.utils, "get_total_norm", spoilt)


@pytest.mark.parametrize("log_every", [1, 3])
@pytest.mark.parametrize("command", SETTINGS)
def test_a_gradient_that_is_not_finite(command, log_every, folder, monkeypatch, capsys):
    argv = [*SETTINGS[command].split(), "--log-every", str(log_every), "--out"]
    bad = FIRST_BAD.get(command, FAULT)
    if command == "ppo":
        argv[-1:-1] = ["--epochs", "2", "--minibatches", "2"]
    capsys.readouterr()
    with monkeypatch.context() as patch:
        spoil(patch)
        assert main([*argv, "run"]) == 1
    message = capsys.readouterr().err
    unit = "rollout" if command == "ppo" else "step"
    assert message.count("\n") == 1, message
    assert message.startswith(f"primer-fast train {command}: {NAMES.get(command, command)}: the ")
    assert f"not finite at {unit} {bad};" in message
    rows = RunFolder(folder / "run", f"train {command}").rows()
    assert [row["step"] for row in rows] == [
        s for s in range(1, bad) if s % log_every == 0 or (command, s) == ("gpt", 4)
    ]
    assert not os.path.exists("run/model.safetensors")
    if rows:
        assert "the checkpoint in run is of an earlier step and kept" in message
        with safetensors.safe_open("run/checkpoint.safetensors", framework="pt") as file:
            assert json.loads(file.metadata()["progress"])["step"] < bad
            assert all(file.get_tensor(name).isfinite().all() for name in file.keys())  # noqa: SIM118
    else:
        assert "no checkpoint had been written yet" in message and not os.path.exists("run/checkpoint.safetensors")
    assert main([*argv[:2], "--out", "run", "--resume"]) == 0
    assert main([*argv, "whole"]) == 0
    assert soak.differences(soak.contents(folder / "run"), soak.contents(folder / "whole")) == []
