"""Where PPO's rewards come from: a reward model, or any function on texts or tokens; and that they are numbers."""

__all__ = ["Reward", "RewardError", "checked_scores", "reward_of_lists", "reward_of_model"]

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from primer_fast.data.completions import Completions
from primer_fast.models.reward import RewardModel
from primer_fast.train.reward import score

Reward = Callable[[Completions], Tensor | Sequence[float]]  # one number a row


class RewardError(ValueError):
    """The reward raised, or did not return a finite number for each completion; nothing of the state has changed."""


def checked_scores(reward: Reward, batch: Completions, rollout: int) -> Tensor:  # -> (N,) float32
    """What ``reward`` gives for a batch, if it is a finite number for each completion; else RewardError."""
    try:
        found = reward(batch)
    except (Exception, SystemExit) as error:
        raise RewardError(f"ppo: the reward raised {type(error).__name__} at rollout {rollout}: {error}") from error
    try:
        scores = _numbers(found)
    except Exception as error:  # what was returned is the user's, and so is what it does when it is read
        why = f"{type(found).__name__} ({type(error).__name__}: {error})"
        raise RewardError(f"ppo: the reward must return numbers; got {why}") from error
    if scores.shape != (len(batch),):
        got = tuple(scores.shape)
        raise RewardError(f"ppo: the reward must return ({len(batch)},), a number per completion; got {got}")
    bad = (~scores.isfinite()).nonzero()
    if len(bad):
        i = int(bad[0])
        raise RewardError(
            f"ppo: the reward must be finite; got {scores[i].item()} for completion {i}, rollout {rollout}"
        )
    return scores


def _numbers(found: Tensor | Sequence[float]) -> Tensor:  # -> float32
    """Raises whatever torch does for what holds no numbers or cannot be read."""
    # A list is read as float32 at once: its whole numbers may be too large for int64.
    scores = torch.as_tensor(found, dtype=None if hasattr(found, "dtype") else torch.float32).detach()
    if scores.is_complex():
        raise TypeError(f"{scores.dtype} has imaginary parts")
    if scores.is_meta:
        raise TypeError("a tensor on the meta device holds none")
    if scores.layout != torch.strided:
        scores = scores.to_dense()
    return scores.float()


def reward_of_lists(
    function: Callable[[list, list], Sequence[float]], decode: Callable[[list[int]], str] | None = None
) -> Reward:
    """A reward from any function of prompts and completions: lists of texts where ``decode`` is given, else of tokens.

    Both are without padding; completions keep the token that ends them.
    """

    def reward(batch: Completions) -> Sequence[float]:
        rows = zip(batch.tokens.tolist(), batch.prompt_lengths.tolist(), batch.lengths.tolist(), strict=True)
        pairs = [(row[:start], row[start:stop]) for row, start, stop in rows]
        if decode is not None:
            pairs = [(decode(prompt), decode(completion)) for prompt, completion in pairs]
        return function([prompt for prompt, _ in pairs], [completion for _, completion in pairs])

    return reward


def reward_of_model(model: RewardModel) -> Reward:
    """A reward from a trained model, which takes the same tokens as the policy."""
    return lambda batch: score(model, batch)
