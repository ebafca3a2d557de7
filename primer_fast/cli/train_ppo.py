"""primer-fast train ppo: a transformer learns to write what a reward model, or any function, scores high."""

import copy

import torch

from primer_fast.cli.base_run import load_policy, load_reward
from primer_fast.cli.options.train_ppo import SYNTAX, Options
from primer_fast.cli.preference_tasks import PPOTask
from primer_fast.cli.training import TrainCommand
from primer_fast.data.prompts import read_prompts
from primer_fast.models.actor_critic import ActorCritic


def load_task(options: Options) -> PPOTask:
    base, tokenizer, end = load_policy(options.model)
    reward = load_reward(options.reward, tokenizer)
    room = base.config.context - options.train.max_new_tokens
    prompts = []
    for number, prompt in enumerate(read_prompts(options.data), start=1):
        try:
            tokens = tokenizer.encode(prompt) or [end]
        except ValueError as error:
            raise ValueError(f"{options.data}, prompt {number}: {error}") from error
        if len(tokens) > room:
            raise ValueError(
                f"{options.data}, prompt {number}: must leave room for --max-new-tokens "
                f"{options.train.max_new_tokens} in the context of {base.config.context}; got {len(tokens)} tokens"
            )
        prompts.append(torch.tensor(tokens))
    return PPOTask(base, tokenizer, end, prompts, options.train.seed, reward)


def make_model(options: Options, task: PPOTask) -> ActorCritic:
    return ActorCritic(copy.deepcopy(task.base), "shared" if options.shared_critic else None)


COMMAND = TrainCommand(SYNTAX, load_task, make_model)
main = COMMAND.main
