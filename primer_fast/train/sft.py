"""Supervised fine-tuning: a language model learns completions, given their prompts.

    loss = -1/n sum over completion tokens of log p(token | all before it)      in nats, over the n of a batch
The prompt's own tokens are not learned; the token that ends a completion is.
Source: Ouyang et al. 2022, arXiv:2203.02155, step 1.
"""

__all__ = ["SFTConfig", "evaluate", "start", "train", "train_step"]

from collections.abc import Callable, Iterator
from typing import Any

import torch

from primer_fast.data.completions import Completions
from primer_fast.models.transformer import Transformer
from primer_fast.train.log_probs import token_log_probs
from primer_fast.train.settings import SFTConfig
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


def train(
    state: TrainState[Transformer],
    completions: Completions,
    config: SFTConfig,
    *,
    should_stop: Callable[[], bool] = lambda: False,  # asked after each step
) -> Iterator[dict[str, float]]:
    """Go on from ``state`` to the last step; yield one dict of metrics per logged step, means since the one before.

    Which completions a step sees is a function of (seed, step), so that a state resumed from ``pack`` goes on bit for
    bit.

    Raises:
        FloatingPointError: the loss, the gradient or a weight is no longer finite; says at which step.
    """
    last = total_steps(len(completions), config)
    state.model.train()
    yield from run_epochs(
        state, len(completions), config, lambda rows: train_step(state, completions[rows], config, last), should_stop
    )
    state.model.eval()


def train_step(state: TrainState[Transformer], batch: Completions, config: SFTConfig, last: int) -> None:
    """One optimizer step on one batch; its loss and gradient norm are appended to ``state.window``."""
    device = next(state.model.parameters()).device
    set_learning_rate(state, config, last)
    state.optimizer.zero_grad()
    count = batch.mask().sum()  # of the whole batch: a mean of means would overweight short completions
    loss: Any = 0
    for micro in state.micro_batches(len(batch), config.accumulate):
        part = batch[micro.rows].to(device)
        with autocast(device.type, config.precision):
            part_loss = micro.counted(-state.forward(token_log_probs, part).sum() / count.to(device))
        state.backward(part_loss)
        loss = loss + part_loss.detach()
    record(state, **state.world.sum(loss=loss), grad_norm=apply_gradient(state, config.clip_norm))


@torch.no_grad()
def evaluate(model: Transformer, completions: Completions, batch_size: int = 256) -> float:
    """Mean loss in nats per completion token."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    parts = torch.arange(len(completions)).split(batch_size)
    total = sum(-token_log_probs(model, completions[rows].to(device)).double().sum().item() for rows in parts)
    model.train(training)
    return total / completions.mask().sum().item()
