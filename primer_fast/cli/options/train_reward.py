"""Of `primer-fast train reward`."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from primer_fast.cli.options.pairs import PairOptions
from primer_fast.cli.options.training import Syntax
from primer_fast.train.settings import RewardConfig


@dataclass(frozen=True, kw_only=True)
class Options(PairOptions):
    """Train a reward model on preferences; metrics, checkpoint, weights, curves and scored texts go to a folder."""

    train: Annotated[RewardConfig, tyro.conf.arg(name="")]


def default_options(data: str) -> Options:
    return Options(data=data, model=tyro.MISSING, train=RewardConfig())


SYNTAX = Syntax("reward", Options, default_options, RewardConfig)
parse = SYNTAX.parse
