"""`primer-fast align --resume`: what is finished is not done again, and nothing of another run is taken for its own."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from cli.commands import ALIGN, LEXICON, at_step, saved_step, spoil

from primer_fast.cli import align, main
from primer_fast.cli.align import stages as align_stages
from primer_fast.cli.align.folder import StageFolder
from primer_fast.cli.options import align as options
from primer_fast.cli.run.folder import RunFolder
from primer_fast.data.tokenizers import ByteTokenizer
from primer_fast.models.mlp import MLP, MLPConfig
from primer_fast.train import supervised
from primer_fast.train.supervised import SupervisedConfig

pytestmark = pytest.mark.usefixtures("plain_path")
BEGIN, RESUME = [*ALIGN.split(), "--out", "run"], ["align", "--out", "run", "--resume"]
STAGES = {"language": 6, "reward": 3, "ppo": 3, "dpo-0.5": 3, "dpo-2": 3}  # the step of each one's third row


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tmp_path_factory.mktemp("align")


@pytest.fixture
def whole(made, tmp_path, monkeypatch):
    """A small run on words, without pictures, that nothing disturbs; made once."""
    monkeypatch.setattr(align, "load_lexicon", lambda: LEXICON)
    monkeypatch.setattr(align.align_plots, "draw", lambda folder, result: None)
    monkeypatch.setattr(align.align_report, "page_of", lambda folder, result, seconds: "page")
    monkeypatch.chdir(tmp_path)
    if not (made / "whole").exists():
        assert main([*ALIGN.split(), "--out", str(made / "whole")]) == 0
    return made / "whole"


def results(folder="run"):
    content = json.loads(Path(folder, "results.json").read_text())
    del content["seconds"]
    return content


def interrupt():
    """As by a second Ctrl-C."""
    raise KeyboardInterrupt


def test_an_interrupted_stage_goes_on_and_those_before_are_not_done_again(whole, monkeypatch, capsys):
    trained, log, begun = [], RunFolder.log, "language"
    monkeypatch.setattr(RunFolder, "log", lambda self, row: (trained.append(self.path.name), log(self, row)))
    names, call = list(STAGES), BEGIN
    for stage in ("language", "reward", "ppo", "dpo-2", None):
        trained.clear()
        if stage is None:
            assert main(call) == 0
        else:
            with at_step(STAGES[stage], interrupt, stage):
                assert main(call) == 130
            assert "interrupted; --resume goes on" in capsys.readouterr().err
        assert set(trained) == set(names[names.index(begun) : names.index(stage or "dpo-2") + 1])
        rows = len(RunFolder(whole / begun, f"align {begun}").rows())
        assert call == BEGIN or trained.count(begun) < rows, "from its checkpoint on"
        begun, call = stage, RESUME
    assert results() == results(whole)


def test_a_signal_leaves_a_checkpoint_or_a_finished_stage(whole, monkeypatch, capsys):
    """In the last step of a stage the second; each call goes on with the one before."""
    with at_step(20, lambda: signal.raise_signal(signal.SIGTERM), "language"):
        assert main(BEGIN) == 143
    assert Path("run/language/model.safetensors").exists() and not Path("run/reward").exists()
    assert main(["sample", "run/language", "--tokens", "3"]) == 0
    with monkeypatch.context() as patch, at_step(3, lambda: signal.raise_signal(signal.SIGTERM), "dpo-2"):
        patch.setattr(align_stages, "CHECKPOINTS", 1)  # none but at the end, and this one
        assert main(RESUME) == 143
    assert capsys.readouterr().err.count("interrupted; --resume goes on") == 2
    rows = RunFolder("run/dpo-2", "align dpo-2").rows()
    assert saved_step("run/dpo-2") == rows[-1]["step"] and len(rows) == 3
    assert main(RESUME) == 0
    assert results() == results(whole)


def test_a_finished_run_says_its_result_again_with_its_options_and_its_data(whole, monkeypatch, refused):
    shutil.copytree(whole, "run")
    monkeypatch.setattr(align_stages.Stages, "_train", None)
    assert main([*BEGIN, "--resume"]) == main(RESUME) == 0
    assert results() == results(whole)
    again, seconds = (json.loads(Path(folder, "seconds.json").read_text()) for folder in ("run", whole))
    assert all(again[name] >= value > 0 for name, value in seconds.items()), "time of all calls"
    message = refused([*BEGIN, "--resume", "--width", "32"])
    assert "run: the run was begun with width 16 (now 32); leave them out to go on" in message
    monkeypatch.setattr(align, "load_lexicon", lambda: LEXICON[:-1])
    assert "run: the run was begun with other data than there is now; start anew" in refused(RESUME)
    assert "none: no such folder, so there is no run to go on with" in refused("align --out none --resume")


def test_a_run_that_is_replaced_leaves_no_stage_behind(whole, capsys):
    """The stages of the run before are finished, but not this run's."""
    shutil.copytree(whole, "run")
    with at_step(6, interrupt, "language"):
        assert main([*BEGIN, "--seed", "1"]) == 130
    assert main(RESUME) == 0
    assert main([*BEGIN, "--seed", "1", "--out", "other"]) == 0
    assert results() == results("other") != results(whole)


@pytest.mark.parametrize("change", [{"width": "x"}, {"ppo": 3}, {"foo": 1}, {"points": 0}, {"betas": ["x"]}], ids=str)
def test_a_damaged_configuration(change, whole, refused):
    RunFolder("run", "align").begin(options.to_json(options.default_options()) | change, overwrite=False)
    assert "run/config.json: not the configuration of this command (" in refused(RESUME)


def test_a_damaged_stage_is_named(whole, refused):
    with at_step(3, interrupt, "ppo"):
        assert main(BEGIN) == 130
    for file in ("ppo/checkpoint.safetensors", "reward/model.safetensors"):
        with open(f"run/{file}", "r+b") as stage:
            stage.truncate(100)
        assert f"run/{file}: not a safetensors file, or a truncated" in refused(RESUME)


def test_a_gradient_that_is_not_finite(whole, refused):
    with spoil(25):  # of 20 steps of pretraining and 6 of the reward model
        message = refused(BEGIN, status=1)
    assert message.startswith("primer-fast align: reward: the gradient is not finite at step 5;")
    assert main(RESUME) == 0
    assert results() == results(whole)


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
