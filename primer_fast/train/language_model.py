"""Language modelling: every position of a window of text predicts the token after it.

    loss = -1/n sum_t log p(token_{t+1} | token_1 .. token_t)          in nats, over the n tokens of a batch
Sources: Vaswani et al. 2017, arXiv:1706.03762; the settings are those that nanoGPT trains small models with on a CPU.
Legend: B windows of a batch, T context.
"""

__all__ = [
    "LanguageModel",
    "LanguageModelConfig",
    "batch",
    "evaluate",
    "is_logged",
    "is_validated",
    "loss_sum",
    "start",
    "train",
    "train_step",
    "update",
]

import itertools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from primer_fast.data.text import TokenizedText, consecutive_windows, windows
from primer_fast.train import cuda_graphs
from primer_fast.train.parallel import ALONE, World
from primer_fast.train.settings import LanguageModelConfig
from primer_fast.train.state import TrainState, generator
from primer_fast.train.steps import (
    apply_gradient,
    autocast,
    record,
    run,
    sent,
    set_learning_rate,
    start,
)


class LanguageModel(Protocol):
    """What is trained here: a module whose ``config.context`` is the longest window that it takes."""

    def loss(self, tokens: Tensor, targets: Tensor, *, reduction: str) -> Tensor: ...  # (B, T), (B, T) -> ()


def is_logged(step: int, config: LanguageModelConfig) -> bool:
    """Whether a row of metrics follows optimizer step number ``step`` (1, 2, ...)."""
    return step % config.log_every == 0 or is_validated(step, config)


def is_validated(step: int, config: LanguageModelConfig) -> bool:
    """Whether the held-out text is measured after optimizer step number ``step`` (1, 2, ...)."""
    return step % config.eval_every == 0 or step == config.steps


def batch(tokens: Tensor, context: int, config: LanguageModelConfig, step: int) -> Tensor:  # -> (B, T + 1) int64
    """The windows that step 0, 1, ... sees: drawn anywhere in ``tokens``, a function of (seed, step) alone."""
    starts = torch.randint(0, len(tokens) - context, (config.batch_size,), generator=generator(config.seed, 2, step))
    return windows(tokens, starts, context + 1)


def train(
    state: TrainState,
    text: TokenizedText,
    config: LanguageModelConfig,
    *,
    should_stop: Callable[[], bool] = lambda: False,  # asked after each step
) -> Iterator[dict[str, float]]:
    """Go on from ``state`` to the last step; yield one dict of metrics per logged step.

    ``train/loss`` (nats per token) and ``train/grad_norm`` (before clipping) are means over the steps since the row
    before, ``train/seconds`` the time that those took; ``validation/loss`` is measured every ``eval_every`` steps.
    Which windows a step sees is a function of (seed, step), so that a state resumed from ``pack`` goes on bit for bit.

    Raises:
        ValueError: a text shorter than a window.
        FloatingPointError: the loss, the gradient or a weight is no longer finite; says at which step.
    """
    context = state.model.config.context
    shortest = min(len(text.train), len(text.validation))
    if shortest < context + 1:
        raise ValueError(f"language_model: both parts of the text must have more than {context} tokens; got {shortest}")
    device = next(state.model.parameters()).device
    step = cuda_graphs.recorded(
        update, state, asked=config.cuda_graphs, batch=config.batch_size,
        rows=config.batch_size * context // config.accumulate, procedure="language_model",
    )  # fmt: skip
    every = (batch(text.train, context, config, number) for number in itertools.count(state.step))
    rows = run(
        state, config, config.steps, every, lambda drawn: train_step(state, sent(drawn, device), config, step),
        should_stop, is_logged=lambda number: is_logged(number, config), prefix="train/",
    )  # fmt: skip
    before = state.step
    for row in rows:
        tokens = (state.step - before) * config.batch_size * context  # since the last row
        row["tokens"] = state.step * config.batch_size * context
        row["train/tokens_per_second"] = tokens / row["train/seconds"]
        if is_validated(state.step, config):
            row["validation/loss"] = evaluate(state.whole(), text.validation, config, config.eval_batches, state.world)
        yield row
        before = state.step


def update(state: TrainState, windows: Tensor, config: LanguageModelConfig) -> None:  # (B, T + 1) int64
    """One optimizer step on one batch; its loss and gradient norm are appended to ``state.window``."""
    state.optimizer.zero_grad()
    count = windows[:, 1:].numel()
    loss: Any = 0
    for micro in state.micro_batches(len(windows), config.accumulate):
        # The sum over the micro-batch divided by the tokens of the whole batch: a mean of means would overweight a
        # short last one.
        part_loss = micro.counted(state.forward(loss_sum, windows[micro.rows], config) / count)
        state.backward(part_loss)
        loss = loss + part_loss.detach()
    norm = apply_gradient(state, config.clip_norm)
    record(state, **state.world.sum(loss=loss), grad_norm=norm)


def train_step(
    state: TrainState, windows: Tensor, config: LanguageModelConfig, step: cuda_graphs.Update = update
) -> None:  # (B, T + 1) int64
    """``step``, which is ``update`` or a recording of it, at the learning rate of its number."""
    set_learning_rate(state, config, config.steps)
    step(state, windows, config)


def loss_sum(model: LanguageModel, windows: Tensor, config: LanguageModelConfig) -> Tensor:  # (B, T + 1) -> () float32
    """-sum log p(token | the window's tokens before it), over all tokens but each window's first."""
    with autocast(windows.device.type, config.precision):
        loss = model.loss(windows[:, :-1], windows[:, 1:], reduction="sum")
    return loss.float()  # a model of one's own may have it in 16 bits


@torch.no_grad()
def evaluate(
    model: Any,  # a module that is a LanguageModel
    tokens: Tensor,
    config: LanguageModelConfig,
    batches: int | None = None,
    world: World = ALONE,
) -> float:
    """Mean loss in nats per token of ``tokens`` (N,), in consecutive windows or ``batches`` of them.

    world: of processes that take the batches in turn.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    most = None if batches is None else batches * config.batch_size
    for number, part in enumerate(consecutive_windows(tokens, model.config.context + 1, config.batch_size, most)):
        if number % world.size == world.rank:
            total += loss_sum(model, part.to(device), config)
        count += part[:, 1:].numel()
    model.train(training)
    return world.sum(total=total)["total"].item() / count
