"""primer-fast train dpo: a transformer learns what people prefer from their preferences alone."""

from primer_fast.cli import threads  # noqa: F401

# isort: split

import copy
from dataclasses import dataclass
from typing import Annotated

import tyro

from primer_fast.cli import training
from primer_fast.cli.base_run import load_policy
from primer_fast.cli.preference_data import PairOptions, load_pairs
from primer_fast.cli.preference_tasks import DPOTask
from primer_fast.cli.training import Command
from primer_fast.train.dpo import DPOConfig


@dataclass(frozen=True, kw_only=True)
class Options(PairOptions):
    """Direct preference optimisation; metrics, checkpoint, weights, curves and samples go to a folder."""

    train: Annotated[DPOConfig, tyro.conf.arg(name="")]


def default_options(data: str) -> Options:
    return Options(data=data, model=tyro.MISSING, train=DPOConfig(lr=1e-5))


def load_task(options: Options) -> DPOTask:
    base, tokenizer, end = load_policy(options.model)
    train, test, prompts = load_pairs(options, tokenizer, end, base.config.context)
    return DPOTask(base, tokenizer, end, prompts, options.train.seed, train, test, COMMAND.folder(options))


def make_model(options: Options, task: DPOTask):
    return copy.deepcopy(task.base)


COMMAND = Command("dpo", Options, default_options, load_task, make_model, DPOConfig)


def main(argv: list[str]) -> int:
    return training.main(COMMAND, argv)
