"""primer-fast train sft, reward, dpo, ppo: a transformer learns completions, and which of them people prefer."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from primer_fast.cli.options.train import preferences as options_of
from primer_fast.cli.options.train.preferences import PairOptions, PPOOptions, SFTOptions
from primer_fast.cli.run.base_run import load_policy, load_reward
from primer_fast.cli.run.training import TrainCommand
from primer_fast.cli.train.preference_tasks import CompletionTask, DPOTask, PPOTask, RewardTask, SFTTask
from primer_fast.data.completions import CompletionPairs, encode_completions, encode_pairs
from primer_fast.data.preferences import (
    Preference,
    load_lexicon,
    pair_texts,
    read_preferences,
    read_ratings,
    split_pairs,
    split_texts,
)
from primer_fast.data.prompts import read_completions, read_prompts
from primer_fast.data.tokenizers import Tokenizer
from primer_fast.models.actor_critic import ActorCritic
from primer_fast.models.reward import RewardModel
from primer_fast.models.transformer import Transformer
from primer_fast.train.state import generator

LEXICON = "lexicon"


def load_sft(options: SFTOptions) -> SFTTask:
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
    prompts = _prompts([texts[i][0] for i in order[:out]], tokenizer, end)
    prompts = [p for p in prompts if len(p) < base.config.context]
    return SFTTask(base, tokenizer, end, prompts, options.train.seed, every[order[out:]], every[order[:out]])


def load_reward_task(options: PairOptions) -> RewardTask:
    return RewardTask(*_load_pairs(options))


def load_dpo(options: PairOptions) -> DPOTask:
    return DPOTask(*_load_pairs(options), options_of.DPO.folder(options))


def load_ppo(options: PPOOptions) -> PPOTask:
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


def _load_pairs(
    options: PairOptions,
) -> tuple[Transformer, Tokenizer, int, list[Tensor], int, CompletionPairs, CompletionPairs]:
    """What a ``PairTask`` is made of: pairs to train on and pairs held out, whose prompts it shows samples of.

    Raises:
        ValueError, FileNotFoundError: the data cannot be read, or does not fit the model; names the file.
    """
    base, tokenizer, end = load_policy(options.model)
    read: Any
    if options.data != LEXICON and Path(options.data).suffix.lower() != ".tsv":
        read = read_preferences(options.data)
    else:
        read = load_lexicon() if options.data == LEXICON else read_ratings(options.data)
    try:
        parts = _parts(read, options)
        pairs, held_out = (encode_pairs(part, tokenizer.encode, end=end, context=base.config.context) for part in parts)
    except ValueError as error:
        raise ValueError(f"{options.data}: {error}") from error
    prompts = _prompts([pair.prompt for pair in parts[1]], tokenizer, end)
    return base, tokenizer, end, prompts, options.train.seed, pairs, held_out


def _parts(read: Any, options: PairOptions) -> tuple[list[Preference], list[Preference]]:
    """Preferences to train on, and those held out, of preferences or of rated texts that are paired here."""
    seed = options.train.seed
    if isinstance(read[0], Preference):
        return split_pairs(read, options.held_out, seed)
    counts = options.pairs, max(1, options.pairs // 5)
    train, test = (
        pair_texts(part, count, minimum_gap=options.minimum_gap, with_margin=True, seed=seed)
        for part, count in zip(split_texts(read, options.held_out, seed), counts, strict=True)
    )
    return train, test


def _prompts(texts: list[str], tokenizer: Tokenizer, end: int) -> list[Tensor]:
    """The tokens of each different prompt; the end token stands for an empty one."""
    return [torch.tensor(tokenizer.encode(text) or [end]) for text in dict.fromkeys(texts)]


def _copied(options: Any, task: CompletionTask) -> Transformer:
    return copy.deepcopy(task.base)


def _rewarding(options: Any, task: RewardTask) -> RewardModel:
    return RewardModel.from_language_model(task.base)


def _acting(options: PPOOptions, task: PPOTask) -> ActorCritic:
    return ActorCritic(copy.deepcopy(task.base), "shared" if options.shared_critic else None)


SFT = TrainCommand(options_of.SFT, load_sft, _copied)
REWARD = TrainCommand(options_of.REWARD, load_reward_task, _rewarding)
DPO = TrainCommand(options_of.DPO, load_dpo, _copied)
PPO = TrainCommand(options_of.PPO, load_ppo, _acting)
