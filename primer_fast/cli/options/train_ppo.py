"""Of `primer-fast train ppo`."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from primer_fast.cli.options.training import Syntax, TrainOptions
from primer_fast.train.settings import PPOConfig


@dataclass(frozen=True, kw_only=True)
class Options(TrainOptions):
    """Proximal policy optimisation; metrics, checkpoint, weights, curves and samples go to a folder."""

    data: Annotated[
        str, tyro.conf.arg(name="prompts")
    ]  # a text file of a prompt a line, or a .jsonl with "prompt" in each
    model: str  # folder of a finished run of `train gpt` or `train sft`, or a Hugging Face GPT-2 checkpoint's
    reward: str  # folder of a run of `train reward`; or module:function, (prompts, completions) -> a number for each
    train: Annotated[PPOConfig, tyro.conf.arg(name="")]
    shared_critic: bool = False  # the critic reads the policy's trunk instead of one of its own


def default_options(data: str) -> Options:
    return Options(data=data, model=tyro.MISSING, reward=tyro.MISSING, train=PPOConfig())


SYNTAX = Syntax("ppo", Options, default_options, PPOConfig, data_option="prompts")
parse = SYNTAX.parse
