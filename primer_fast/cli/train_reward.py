"""primer-fast train reward: a transformer learns which completions people prefer."""

from primer_fast.cli import threads  # noqa: F401

# isort: split

from dataclasses import dataclass
from typing import Annotated

import tyro

from primer_fast.cli import training
from primer_fast.cli.base_run import load_policy
from primer_fast.cli.preference_data import PairOptions, load_pairs
from primer_fast.cli.preference_tasks import RewardTask
from primer_fast.cli.training import Command
from primer_fast.models.reward import RewardModel
from primer_fast.train.reward import RewardConfig


@dataclass(frozen=True, kw_only=True)
class Options(PairOptions):
    """Train a reward model on preferences; metrics, checkpoint, weights, curves and scored texts go to a folder."""

    train: Annotated[RewardConfig, tyro.conf.arg(name="")]


def default_options(data: str) -> Options:
    return Options(data=data, model=tyro.MISSING, train=RewardConfig())


def load_task(options: Options) -> RewardTask:
    base, tokenizer, end = load_policy(options.model)
    train, test, prompts = load_pairs(options, tokenizer, end, base.config.context)
    return RewardTask(base, tokenizer, end, prompts, options.train.seed, train, test)


def make_model(options: Options, task: RewardTask) -> RewardModel:
    return RewardModel.from_language_model(task.base)


COMMAND = Command("reward", Options, default_options, load_task, make_model, RewardConfig)


def main(argv: list[str]) -> int:
    return training.main(COMMAND, argv)
