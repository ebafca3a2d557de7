"""primer-fast train reward: a transformer learns which completions people prefer."""

from primer_fast.cli.base_run import load_policy
from primer_fast.cli.options.train_reward import SYNTAX, Options
from primer_fast.cli.preference_data import load_pairs
from primer_fast.cli.preference_tasks import RewardTask
from primer_fast.cli.training import TrainCommand
from primer_fast.models.reward import RewardModel


def load_task(options: Options) -> RewardTask:
    base, tokenizer, end = load_policy(options.model)
    train, test, prompts = load_pairs(options, tokenizer, end, base.config.context)
    return RewardTask(base, tokenizer, end, prompts, options.train.seed, train, test)


def make_model(options: Options, task: RewardTask) -> RewardModel:
    return RewardModel.from_language_model(task.base)


COMMAND = TrainCommand(SYNTAX, load_task, make_model)
main = COMMAND.main
