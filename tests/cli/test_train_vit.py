"""What is not shared with train mlp: the model and its options; and that what is shared works for it."""

import matplotlib.image
import pytest
import safetensors.torch
from cli.conftest import metrics

from primer_fast.cli import main, train_vit
from primer_fast.models.vit import ViT, ViTConfig

pytestmark = pytest.mark.usefixtures("plain_path")
PICTURES = ("curves.png", "confusion.png", "mistakes.png")


@pytest.fixture
def short(digits_folder, tmp_path):
    """The arguments of a short run on images of 6 x 6 pixels, 8 steps of 2 rows each."""
    argv = ["--data", str(digits_folder), "--out", str(tmp_path / "run"), "--patch", "3", "--width", "16"]
    argv += ["--layers", "1", "--heads", "2", "--batch-size", "16", "--epochs", "4", "--log-every", "2"]
    return [*argv, "--warmup-steps", "2"]


def test_digits_are_learned_and_drawn(short, tmp_path, capsys):
    assert main(["train", "vit", *short, "--epochs", "60", "--lr", "0.01", "--augmentation", "none"]) == 0
    out = tmp_path / "run"
    assert metrics(out)[-1]["step"] == 240 and metrics(out)[-1]["test/accuracy"] > 0.95
    for name in PICTURES:
        height, width, _ = matplotlib.image.imread(out / name).shape
        assert height > 80 and width > 300
    model = ViT(ViTConfig((1, 6, 6), patch=3, width=16, layers=1, heads=2))
    model.load_state_dict(safetensors.torch.load_file(out / "model.safetensors"))
    printed = capsys.readouterr().out
    assert "of 30 digits)" in printed and all(name in printed for name in PICTURES)


def test_resume_is_the_uninterrupted_run(short, stop_and_resume, monkeypatch):
    """With dropout, whose state of the random number generator goes through the files."""
    monkeypatch.setattr(train_vit.DigitsForViT, "draw", lambda *_: [])
    stop_and_resume(train_vit.main, [*short, "--dropout", "0.1", "--pool", "mean"], 6)


CALLS = {
    "patch": (["--patch", "4"], "ViT: patch must divide height and width; got 4 and [6, 6]"),
    "heads": (["--heads", "3"], "heads must divide width; got 3 and 16"),
    "loss": (["--loss", "binary_cross_entropy"], "--loss must be cross_entropy for this data"),
    "data": (["--data", "nowhere"], "nowhere: no such folder"),
    "option": (["--compare-torch"], "--compare-torch"),
}


@pytest.mark.parametrize("call", CALLS)
def test_wrong_call(call, short, capsys):
    argv, message = CALLS[call]
    assert train_vit.main([*short, *argv]) == 2
    captured = capsys.readouterr()
    assert message in " ".join((captured.err + captured.out).split())
