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

import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from primer_fast.data.text import TokenizedText, consecutive_windows, windows
from primer_fast.train import cuda_graphs
from primer_fast.train.common import (
    TrainState,
    apply_gradient,
    autocast,
    check_finite,
    generator,
    learning_rate,
    make_optimizer,
    mean_norm,
    record,
    sent,
    set_learning_rate,
)
from primer_fast.train.settings import LanguageModelConfig
from primer_fast.train.world import ALONE, World


class LanguageModel(Protocol):
    """What is trained here: a module whose ``config.context`` is the longest window that it takes."""

    def loss(self, tokens: Tensor, targets: Tensor, *, reduction: str) -> Tensor: ...  # (B, T), (B, T) -> ()


def start(model: torch.nn.Module, config: LanguageModelConfig) -> TrainState:
    """The state before the first step of training ``model`` on the device that it is on."""
    optimizer = make_optimizer(
        model, "adamw", lr=config.lr, weight_decay=config.weight_decay, betas=config.betas, momentum=0.0
    )
    device = next(model.parameters()).device.type
    return TrainState(model, optimizer, torch.amp.GradScaler(device, enabled=config.precision == "float16"))


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
    began, seen = time.perf_counter(), 0
    while state.step < config.steps and not should_stop():
        tokens = batch(text.train, context, config, state.step)
        train_step(state, sent(tokens, device), config, step)
        seen += config.batch_size * context
        if is_logged(state.step, config):
            row = _close_window(state, context, config)
            seconds = time.perf_counter() - began
            row |= {"train/seconds": seconds, "train/tokens_per_second": seen / seconds}
            if is_validated(state.step, config):
                row["validation/loss"] = evaluate(
                    state.whole(), text.validation, config, config.eval_batches, state.world
                )
            yield row
            began, seen = time.perf_counter(), 0
    check_finite(state, "language_model")


def update(state: TrainState, windows: Tensor, config: LanguageModelConfig) -> None:  # (B, T + 1) int64
    """One optimizer step on one batch; its loss and gradient norm are appended to ``state.window``."""
    state.optimizer.zero_grad()
    count = windows[:, 1:].numel()
    loss: Any = 0
    for share in state.shares(len(windows), config.accumulate):
        # The sum over the micro-batch divided by the tokens of the whole batch: a mean of means would overweight a
        # short last one.
        part_loss = share.of(state.forward(loss_sum, windows[share.rows], config) / count)
        state.backward(part_loss)
        loss = loss + part_loss.detach()
    norm = apply_gradient(state, config.clip_norm)
    record(state, **state.world.sum(loss=loss), grad_norm=norm)


def train_step(
    state: TrainState, windows: Tensor, config: LanguageModelConfig, step: cuda_graphs.Update = update
) -> None:  # (B, T + 1) int64
    """``step``, which is ``update`` or a recording of it, at the learning rate of its number."""
    lr = learning_rate(
        state.step, peak=config.lr, minimum=config.min_lr, warmup=config.warmup_steps, total=config.steps, cosine=True
    )
    set_learning_rate(state.optimizer, lr)
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


def _close_window(state: TrainState, context: int, config: LanguageModelConfig) -> dict[str, float]:
    """The means over the steps since the last row, which this reads from the device; the window starts anew."""
    check_finite(state, "language_model")
    row = {
        "step": state.step,
        "tokens": state.step * config.batch_size * context,
        "train/loss": torch.stack(state.window["loss"]).double().mean().item(),
        "train/grad_norm": mean_norm(state.window["grad_norm"]),
        "train/learning_rate": float(state.optimizer.param_groups[0]["lr"]),
    }
    state.window = {}
    return row
