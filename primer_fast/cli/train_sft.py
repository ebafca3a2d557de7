"""primer-fast train sft: a transformer learns completions, given their prompts."""

import copy

import torch

from primer_fast.cli.base_run import load_policy
from primer_fast.cli.options.train_sft import SYNTAX, Options
from primer_fast.cli.preference_tasks import SFTTask
from primer_fast.cli.training import TrainCommand
from primer_fast.data.completions import encode_completions
from primer_fast.data.prompts import read_completions
from primer_fast.train.state import generator


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


COMMAND = TrainCommand(SYNTAX, load_task, make_model)
main = COMMAND.main
