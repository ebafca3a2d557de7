"""primer-fast train ppo: a transformer learns to write what a reward model, or any function, scores high."""

from primer_fast.cli import threads  # noqa: F401

# isort: split

import copy
from dataclasses import dataclass
from typing import Annotated

import torch
import tyro

from primer_fast.cli import training
from primer_fast.cli.base_run import load_policy, load_reward
from primer_fast.cli.preference_tasks import PPOTask
from primer_fast.cli.training import Command, TrainOptions
from primer_fast.data.prompts import read_prompts
from primer_fast.models.actor_critic import ActorCritic
from primer_fast.train.ppo import PPOConfig


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


COMMAND = Command("ppo", Options, default_options, load_task, make_model, PPOConfig, data_option="prompts")


def main(argv: list[str]) -> int:
    return training.main(COMMAND, argv)
