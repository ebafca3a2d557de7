"""primer-fast train dpo: a transformer learns what people prefer from their preferences alone."""

import copy

from primer_fast.cli.base_run import load_policy
from primer_fast.cli.options.train_dpo import SYNTAX, Options
from primer_fast.cli.preference_data import load_pairs
from primer_fast.cli.preference_tasks import DPOTask
from primer_fast.cli.training import TrainCommand


def load_task(options: Options) -> DPOTask:
    base, tokenizer, end = load_policy(options.model)
    train, test, prompts = load_pairs(options, tokenizer, end, base.config.context)
    return DPOTask(base, tokenizer, end, prompts, options.train.seed, train, test, COMMAND.folder(options))


def make_model(options: Options, task: DPOTask):
    return copy.deepcopy(task.base)


COMMAND = TrainCommand(SYNTAX, load_task, make_model)
main = COMMAND.main
