"""primer-fast train sft: a transformer learns completions, given their prompts."""

from primer_fast.cli import threads  # noqa: F401

# isort: split

import copy
from dataclasses import dataclass
from typing import Annotated

import torch
import tyro

from primer_fast.cli import training
from primer_fast.cli.base_run import load_policy
from primer_fast.cli.preference_tasks import SFTTask
from primer_fast.cli.training import Command, TrainOptions
from primer_fast.data.completions import encode_completions
from primer_fast.data.prompts import read_completions
from primer_fast.train.common import generator
from primer_fast.train.sft import SFTConfig


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


def load_task(options: Options) -> SFTTask:
    base, tokenizer, end = load_policy(options.model)
    texts = read_completions(options.data)
    try:
        every = encode_completions(texts, tokenizer.encode, end=end, context=base.config.context)
    except ValueError as error:
        raise ValueError(f"{options.data}: {error}") from error
    order = torch.randperm(len(every), generator=generator(options.train.seed, 6))
    out = max(1, round(options.held_out * len(every)))
    if out >= len(every):
        raise ValueError(f"{options.data}: must hold at least two completions; got {len(every)}")
    prompts = [torch.tensor(tokenizer.encode(p) or [end]) for p in dict.fromkeys(texts[i][0] for i in order[:out])]
    prompts = [p for p in prompts if len(p) < base.config.context]
    return SFTTask(base, tokenizer, end, prompts, options.train.seed, every[order[out:]], every[order[:out]])


def make_model(options: Options, task: SFTTask):
    return copy.deepcopy(task.base)


COMMAND = Command("sft", Options, default_options, load_task, make_model, SFTConfig)


def main(argv: list[str]) -> int:
    return training.main(COMMAND, argv)
