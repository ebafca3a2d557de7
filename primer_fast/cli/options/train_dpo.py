"""Of `primer-fast train dpo`."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from primer_fast.cli.options.pairs import PairOptions
from primer_fast.cli.options.training import Syntax
from primer_fast.train.settings import DPOConfig


@dataclass(frozen=True, kw_only=True)
class Options(PairOptions):
    """Direct preference optimisation; metrics, checkpoint, weights, curves and samples go to a folder."""

    train: Annotated[DPOConfig, tyro.conf.arg(name="")]


def default_options(data: str) -> Options:
    return Options(data=data, model=tyro.MISSING, train=DPOConfig(lr=1e-5))


SYNTAX = Syntax("dpo", Options, default_options, DPOConfig)
parse = SYNTAX.parse
