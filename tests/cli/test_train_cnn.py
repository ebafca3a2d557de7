"""What is not shared with train mlp: the model, its options and its pictures; and that what is shared works for it."""

import json

import matplotlib.image
import numpy as np
import pytest
import safetensors.torch
import torch
from cli.conftest import metrics

from primer_fast.bench.torch_twin import torch_twin
from primer_fast.cli import cnn_plots, train_cnn
from primer_fast.cli.run_folder import RunFolder
from primer_fast.functional.activation import ACTIVATIONS
from primer_fast.models.cnn import CNN, CNNConfig

pytestmark = pytest.mark.usefixtures("plain_path")
PICTURES = ("curves.png", "confusion.png", "mistakes.png", "kernels.png", "feature_maps.png", "max_pool.png")


@pytest.fixture
def short(digits_folder, tmp_path):
    """The arguments of a short run on images of 6 x 6 pixels, 8 steps of 2 rows each."""
    argv = ["--data", str(digits_folder), "--out", str(tmp_path / "run"), "--channels", "8", "--kernel-size", "3"]
    return [*argv, "--hidden", "16", "--batch-size", "16", "--epochs", "4", "--log-every", "2", "--warmup-steps", "2"]


def test_digits_are_learned_and_drawn(short, tmp_path, capsys):
    options = ["--epochs", "60", "--lr", "0.01", "--augmentation", "none"]
    assert train_cnn.main([*short, *options]) == 0
    out = tmp_path / "run"
    assert metrics(out)[-1]["step"] == 240 and metrics(out)[-1]["test/accuracy"] == 1.0
    for name in PICTURES:
        height, width, _ = matplotlib.image.imread(out / name).shape
        assert height > 80 and width > 300
    model = CNN(CNNConfig((1, 6, 6), (8,), 3, 2, (16,)))
    model.load_state_dict(safetensors.torch.load_file(out / "model.safetensors"))
    printed = capsys.readouterr().out
    assert "test accuracy 100.00% (30 of 30 digits)" in printed and all(name in printed for name in PICTURES)


def test_resume_is_the_uninterrupted_run(short, stop_and_resume):
    """With two convolutions, so that kernels over several channels, which lie channels_last, go through the files."""
    stop_and_resume(train_cnn.main, [*short, "--channels", "8", "12", "--kernel-size", "2", "--pool", "1"], 6)


def test_the_same_model_from_torch_is_trained_beside(short, capsys):
    assert train_cnn.main([*short, "--compare-torch"]) == 0
    printed = capsys.readouterr().out
    assert "seconds per epoch, median of 4, trained in turns of 2 steps" in printed
    assert float(printed.split("train/loss at most ")[1].split()[0]) < 1e-5


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_twin_is_the_model(activation, channels):
    model = CNN(CNNConfig((channels, 9, 8), (4,), 2, 3, (5,), 3, activation))
    twin = torch_twin(model)
    x = torch.randn(5, 9, 8) if channels == 1 else torch.randn(5, 3, 9, 8)
    torch.testing.assert_close(twin(x), model(x))
    twin_types = {type(module) for module in twin.modules()}
    assert {torch.nn.Conv2d, torch.nn.MaxPool2d, torch.nn.Linear} < twin_types and len(list(twin.parameters())) == 6
    assert not any(type(module).__module__.startswith("primer_fast") for module in twin.modules())


def test_the_run_has_options_of_the_model(short, tmp_path, capsys):
    assert train_cnn.main(short) == 0
    options = json.loads((tmp_path / "run" / "config.json").read_text())["options"]
    assert options["channels"] == [8] and options["kernel_size"] == 3 and options["hidden"] == [16]
    assert train_cnn.main(["--out", str(tmp_path / "run"), "--resume", "--channels", "4"]) == 2
    assert "the run was begun with channels (8,) (now (4,)); leave them out" in capsys.readouterr().err
    assert train_cnn.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(option in printed for option in ("--channels", "--kernel-size", "--pool", "--hidden", "--compare-torch"))


CALLS = {
    "too small": ([], "CNN: every layer must leave at least one pixel; conv2 would leave none"),
    "no convolution": (["--channels"], "CNN: channels must name at least one convolution; got []"),
    "kernel": (["--kernel-size", "0"], "CNN: kernel_size must be a positive integer; got 0"),
    "activation": (["--activation", "swoosh"], "CNN: activation must be None or one of relu"),
    "loss": (["--loss", "binary_cross_entropy"], "--loss must be cross_entropy for this data"),
    "another command's run": (["--out", "mlp", "--channels", "2"], "holds a run of `primer-fast train mlp`, not of"),
    "resume what": (["--resume", "--out", "nowhere"], "nowhere: no such folder, so there is no run to go on with"),
}


@pytest.mark.parametrize("call", CALLS)
def test_wrong_call(call, digits_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    RunFolder("mlp", "train mlp").begin({}, overwrite=False)
    argv, message = CALLS[call]
    assert train_cnn.main(["--data", str(digits_folder), "--kernel-size", "3", *argv]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_soccer_is_not_for_convolutions(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train_cnn.main(["--data", "soccer"]) == 2
    assert "soccer: no such folder" in capsys.readouterr().err


def test_what_max_pool_keeps_is_marked_where_it_is(tmp_path, monkeypatch):
    """The dots of the picture lie on the largest pixel of each window that has one."""
    seen = {}
    monkeypatch.setattr("matplotlib.axes.Axes.scatter", lambda self, x, y, **style: seen.update(x=x, y=y))
    before = np.zeros((4, 4), dtype=np.float32)
    before[1, 0], before[0, 3], before[2, 2] = 5, 7, 9
    kept = np.array([[4, 3], [8, 10]])
    cnn_plots.max_pool(tmp_path / "a.png", before, before, np.array([[5.0, 7.0], [0.0, 9.0]]), kept, 2, "title")
    assert list(zip(seen["y"], seen["x"], strict=True)) == [(1, 0), (0, 3), (2, 2)]


@pytest.mark.parametrize("channels", [(1,), (3, 20), (40, 2, 9)], ids=str)
def test_kernels_and_maps_of_any_number_are_drawn(tmp_path, channels):
    weights = [np.zeros((o, c, 2, 3)) + i for i, (c, o) in enumerate(zip((1, *channels), channels, strict=False))]
    cnn_plots.kernels(tmp_path / "kernels.png", weights, "title")
    maps = {f"conv{i}": np.zeros((c, 4, 5)) for i, c in enumerate(channels)}
    cnn_plots.feature_maps(tmp_path / "maps.png", maps, np.array([0.2, 0.8]), 0, "title")
    for name in ("kernels.png", "maps.png"):
        assert matplotlib.image.imread(tmp_path / name).shape[1] > 300
