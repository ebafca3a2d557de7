"""Of `primer-fast train sft`."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from primer_fast.cli.options.training import Syntax, TrainOptions
from primer_fast.train.settings import SFTConfig


@dataclass(frozen=True, kw_only=True)
class Options(TrainOptions):
    """Fine-tune a transformer on completions; metrics, checkpoint, weights, curves and samples go to a folder."""

    data: str  # a JSON Lines file of prompt, completion; or of prompt, chosen, rejected: the chosen ones are learned
    model: str  # folder of a finished run of `train gpt` or of this command, or a Hugging Face GPT-2 checkpoint's
    train: Annotated[SFTConfig, tyro.conf.arg(name="")]
    held_out: float = 0.1  # share of the completions to measure the loss on at the end

    def __post_init__(self):
        if not 0 < self.held_out < 1:
            raise ValueError(f"--held-out must be between 0 and 1; got {self.held_out}")


def default_options(data: str) -> Options:
    return Options(data=data, model=tyro.MISSING, train=SFTConfig(lr=3e-4, min_lr=3e-5))


SYNTAX = Syntax("sft", Options, default_options, SFTConfig)
parse = SYNTAX.parse
