"""Reward modelling: a score for completions, learned from which of two people preferred.

    loss = -log sigmoid(r_w - r_l - margin) + c (r_w + r_l)^2
The second term centres the rewards at 0; the first sees only differences.
Sources: Bradley & Terry 1952; Ouyang et al. 2022, arXiv:2203.02155, eq. 1; the margin, Touvron et al. 2023,
arXiv:2307.09288, eq. 2; centring, Eisenstein et al. 2023, arXiv:2312.09244.
Legend: B pairs; w won (chosen), l lost (rejected).
"""

__all__ = [
    "RewardConfig",
    "pair_loss",
    "rewards_of",
    "score",
    "start",
    "train",
    "train_step",
    "wilson_interval",
]

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as torch_F
from torch import Tensor

from primer_fast.data.completions import CompletionPairs, Completions
from primer_fast.models.reward import RewardModel
from primer_fast.train.settings import RewardConfig
from primer_fast.train.state import TrainState
from primer_fast.train.steps import (
    apply_gradient,
    autocast,
    record,
    run_epochs,
    set_learning_rate,
    start,
    total_steps,
)


def pair_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0, centring: float = 0.0) -> Tensor:
    """Rewards of both, (B,) and (B,) -> loss of each pair (B,)."""
    loss = -torch_F.logsigmoid(chosen - rejected - margin)
    return loss if centring == 0 else loss + centring * (chosen + rejected) ** 2


def wilson_interval(right: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Confidence interval of a share, 95 % unless z says otherwise (E.B. Wilson 1927).

    Unlike share +- z s it stays within 0 to 1 and holds for few samples.
    """
    if total < 1 or not 0 <= right <= total:
        raise ValueError(f"wilson_interval: must have 0 <= right <= total, total positive; got {right} of {total}")
    share = right / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def train(
    state: TrainState[RewardModel],
    pairs: CompletionPairs,
    config: RewardConfig,
    *,
    should_stop: Callable[[], bool] = lambda: False,  # asked after each step
) -> Iterator[dict[str, float]]:
    """Go on from ``state`` to the last step; yield one dict of metrics per logged step, means since the one before.

    ``accuracy`` is the share of pairs whose chosen completion got the larger reward, ``margin`` the mean difference,
    ``min_reward``, ``mean_reward`` and ``max_reward`` are over both completions. Which pairs a step sees is a function
    of (seed, step), so that a state resumed from ``pack`` goes on bit for bit.

    Raises:
        FloatingPointError: the loss, the gradient or a weight is no longer finite; says at which step.
    """
    last = total_steps(len(pairs), config)
    state.model.train()
    yield from run_epochs(
        state, len(pairs), config, lambda rows: train_step(state, pairs[rows], config, last), should_stop
    )
    state.model.eval()


def train_step(state: TrainState[RewardModel], pairs: CompletionPairs, config: RewardConfig, last: int) -> None:
    """One optimizer step on one batch of pairs; what it measured is appended to ``state.window``."""
    device = next(state.model.parameters()).device
    set_learning_rate(state, config, last)
    state.optimizer.zero_grad()
    loss: Any = 0
    both = torch.zeros(2, len(pairs), device=device)
    for micro in state.micro_batches(len(pairs), config.accumulate):
        batch = pairs[micro.rows]
        with autocast(device.type, config.precision):
            chosen, rejected = state.forward(rewards_of, batch.stacked().to(device)).chunk(2)
        margin = batch.margin.to(device) if config.margins else 0.0
        part_loss = micro.counted(pair_loss(chosen, rejected, margin, config.centring).sum() / len(pairs))
        state.backward(part_loss)
        loss = loss + part_loss.detach()
        if not micro.empty:
            both[:, micro.rows] = torch.stack([chosen, rejected]).detach()
    chosen, rejected = rewards = state.world.sum_tensor(both)
    record(
        state, **state.world.sum(loss=loss),
        accuracy=(chosen > rejected).float().mean(), margin=(chosen - rejected).mean(),
        min_reward=rewards.min(), mean_reward=rewards.mean(), max_reward=rewards.max(),
        grad_norm=apply_gradient(state, config.clip_norm),
    )  # fmt: skip


def rewards_of(model: RewardModel, batch: Completions) -> Tensor:  # -> (N,)
    """The rewards of whole completions."""
    return model(batch.tokens, batch.lengths)


@torch.no_grad()
def score(model: RewardModel, completions: Completions, batch_size: int = 256) -> Tensor:  # -> (N,) float32, on the CPU
    """The rewards of any number of completions, in batches."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    parts = torch.arange(len(completions)).split(batch_size)
    rewards = torch.cat([rewards_of(model, completions[rows].to(device)).cpu() for rows in parts])
    model.train(training)
    return rewards
