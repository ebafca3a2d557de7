"""`primer-fast align --resume`: what is finished is not done again, and nothing of another run is taken for its own."""

import json
import signal
from pathlib import Path

import pytest
import torch
from cli import soak

from primer_fast.cli import align, align_stages, main, sample
from primer_fast.cli.align_folder import StageFolder
from primer_fast.cli.options import align as options
from primer_fast.cli.run_folder import RunFolder
from primer_fast.data.preferences import RatedText
from primer_fast.data.tokenizers import ByteTokenizer
from primer_fast.models.mlp import MLP, MLPConfig
from primer_fast.train import supervised
from primer_fast.train.supervised import SupervisedConfig

pytestmark = pytest.mark.usefixtures("plain_path")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The arguments of a small run into a folder, on words, without pictures."""
    words = [a + b + c for a in ("", "un") for b in ("glad", "sad", "joy", "woe") for c in ("", "ful", "less", "ness")]
    rated = [RatedText(w, 2.0 if "glad" in w or "joy" in w else -2.0) for w in words]
    monkeypatch.setattr(align, "load_lexicon", lambda: rated)
    monkeypatch.setattr(align.align_plots, "draw", lambda folder, result: None)
    monkeypatch.setattr(align.align_report, "page_of", lambda folder, result, seconds: "page")
    monkeypatch.chdir(tmp_path)
    return [*soak.SETTINGS["align"].split()[1:], "--out", "run"]


def stop_in(monkeypatch, folder, by=None):
    """An end after the third row of a stage: at once, as by a second Ctrl-C, or ``by`` a first signal."""
    log, rows = RunFolder.log, []

    def interrupt(self, row):
        log(self, row)
        rows.append(self.path.name)
        if rows.count(folder) == 3:
            if by is None:
                raise KeyboardInterrupt
            signal.raise_signal(by)

    monkeypatch.setattr(RunFolder, "log", interrupt)


def results(folder="run"):
    content = json.loads(Path(folder, "results.json").read_text())
    del content["seconds"]
    return content


@pytest.fixture
def whole(tiny):
    assert main(["align", *tiny, "--out", "whole"]) == 0
    return results("whole")


@pytest.mark.parametrize("stage", ["language", "reward", "ppo", "dpo-2"])
def test_an_interrupted_stage_goes_on_and_those_before_are_not_done_again(stage, tiny, whole, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_in(patch, stage)
        assert main(["align", *tiny]) == 130
    assert "interrupted; --resume goes on" in capsys.readouterr().err
    trained, log = [], RunFolder.log
    monkeypatch.setattr(RunFolder, "log", lambda self, row: (trained.append(self.path.name), log(self, row)))
    assert main(["align", "--out", "run", "--resume"]) == 0
    stages = ["language", "reward", "ppo", "dpo-0.5", "dpo-2"]
    assert set(trained) == set(stages[stages.index(stage) :])
    assert trained.count(stage) < len(RunFolder(f"whole/{stage}", f"align {stage}").rows()), "from its checkpoint on"
    assert results() == whole


def test_a_signal_leaves_a_checkpoint_or_a_finished_stage(tiny, whole, monkeypatch, capsys):
    """In the last step of a stage the second; each call goes on with the one before."""
    last, log = RunFolder("whole/language", "align language").rows()[-1]["step"], RunFolder.log

    def interrupt(self, row):
        log(self, row)
        if (self.path.name, row["step"]) == ("language", last):
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "log", interrupt)
        assert main(["align", *tiny]) == 143
    assert Path("run/language/model.safetensors").exists() and not Path("run/reward").exists()
    with monkeypatch.context() as patch:
        stop_in(patch, "dpo-2", signal.SIGTERM)
        patch.setattr(align_stages, "CHECKPOINTS", 1)  # none but at the end, and this one
        assert main(["align", "--out", "run", "--resume"]) == 143
    assert capsys.readouterr().err.count("interrupted; --resume goes on") == 2
    run = RunFolder("run/dpo-2", "align dpo-2")
    step = json.loads(run.load_checkpoint()[1]["progress"])["step"]
    assert step == run.rows()[-1]["step"] and len(run.rows()) == 3
    assert main(["align", "--out", "run", "--resume"]) == 0
    assert results() == whole


def test_a_finished_run_says_its_result_again(tiny, monkeypatch, capsys):
    assert main(["align", *tiny]) == 0
    seconds, before = json.loads(Path("run/seconds.json").read_text()), results()
    monkeypatch.setattr(align_stages.Stages, "_train", None)
    assert main(["align", "--out", "run", "--resume"]) == 0
    assert results() == before
    again = json.loads(Path("run/seconds.json").read_text())
    assert all(again[name] >= value > 0 for name, value in seconds.items()), "time of both calls"


def test_a_run_that_is_replaced_leaves_no_stage_behind(tiny, monkeypatch, capsys):
    """The stages of the run before are finished, but not this run's."""
    assert main(["align", *tiny]) == 0
    with monkeypatch.context() as patch:
        stop_in(patch, "language")
        assert main(["align", *tiny, "--seed", "1"]) == 130
    assert main(["align", "--out", "run", "--resume"]) == 0
    assert main(["align", *tiny, "--seed", "1", "--out", "whole"]) == 0
    assert results() == results("whole")


def test_the_page_keeps_its_options_and_its_data(tiny, monkeypatch, capsys):
    assert main(["align", *tiny]) == 0
    assert main(["align", *tiny, "--resume"]) == 0
    capsys.readouterr()
    assert main(["align", *tiny, "--resume", "--width", "32"]) == 2
    assert "run: the run was begun with width 16 (now 32); leave them out to go on" in capsys.readouterr().err
    words = align.load_lexicon()
    monkeypatch.setattr(align, "load_lexicon", lambda: words[:-1])
    assert main(["align", "--out", "run", "--resume"]) == 2
    assert "run: the run was begun with other data than there is now; start anew" in capsys.readouterr().err
    assert main(["align", "--out", "none", "--resume"]) == 2
    assert "none: no such folder, so there is no run to go on with" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"width": "x"}, {"ppo": 3}, {"foo": 1}, {"points": 0}, {"betas": ["x"]}], ids=str)
def test_a_damaged_configuration(change, tiny, capsys):
    RunFolder("run", "align").begin(options.to_json(options.default_options()) | change, overwrite=False)
    assert main(["align", "--out", "run", "--resume"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "run/config.json: not the configuration of this command (" in message


@pytest.mark.parametrize("file", ["model.safetensors", "checkpoint.safetensors"])
def test_a_damaged_stage_is_named(file, tiny, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_in(patch, "ppo")
        assert main(["align", *tiny]) == 130
    folder = "reward" if file == "model.safetensors" else "ppo"
    with open(f"run/{folder}/{file}", "r+b") as stage:
        stage.truncate(100)
    capsys.readouterr()
    assert main(["align", "--out", "run", "--resume"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and f"run/{folder}/{file}: not a safetensors file, or a truncated" in message


def test_a_gradient_that_is_not_finite(tiny, whole, monkeypatch, capsys):
    norm, calls = torch.nn.utils.get_total_norm, []

    def spoilt(grads, *args, **kwargs):
        calls.append(1)
        if len(calls) == 25:  # of 20 steps of pretraining and 6 of the reward model
            grads[0].fill_(float("nan"))
        return norm(grads, *args, **kwargs)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "get_total_norm", spoilt)
        assert main(["align", *tiny]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and message.startswith(
        "primer-fast align: reward: the gradient is not finite at step 5;"
    )
    assert main(["align", "--out", "run", "--resume"]) == 0
    assert results() == whole


def test_a_stage_keeps_what_it_is_given(tmp_path):
    config = SupervisedConfig(steps=4, optimizer="sgd")
    state = supervised.start(MLP(MLPConfig((2, 3, 2))), config)
    stage = StageFolder(tmp_path, "ppo", resume=True)
    assert stage.finished(state.model) is None and stage.begin(state) is None
    state.step = 3
    stage.save(state, {"w": torch.ones(2)}, {"due": 0.1})
    other = supervised.start(MLP(MLPConfig((2, 3, 2))), config)
    kept, notes = StageFolder(tmp_path, "ppo", resume=True).begin(other)
    assert other.step == 3 and kept["w"].tolist() == [1, 1] and notes == {"due": 0.1}
    assert StageFolder(tmp_path, "ppo", resume=False).begin(other) is None, "anew"
    stage.finish(state.model, ByteTokenizer(), {"in_budget": False})
    assert StageFolder(tmp_path, "ppo", resume=True).finished(other.model) == {"in_budget": False}
    assert StageFolder(tmp_path, "ppo", resume=False).finished(other.model) is None


def test_a_stage_can_be_sampled_from_before_the_others_are_done(tiny, monkeypatch, capsys):
    stop_in(monkeypatch, "ppo")
    assert main(["align", *tiny]) == 130
    assert sample.main(["run/language", "--tokens", "3"]) == 0
