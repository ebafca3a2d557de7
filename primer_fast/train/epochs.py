"""What the procedures on a fixed set of samples share: supervised fine-tuning, reward modelling, DPO.

Batches are a function of (seed, step); metrics are means over the steps since the row before.
"""

import math
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from primer_fast.train.common import (
    PRECISIONS,
    Model,
    TrainState,
    check_finite,
    epoch_order,
    learning_rate,
    make_optimizer,
    mean_norm,
)


class OptimizerOptions(Protocol):
    """The part of a configuration that these procedures have in common; the classes say what each is."""

    # fmt: off
    @property
    def lr(self) -> float: ...
    @property
    def min_lr(self) -> float: ...
    @property
    def schedule(self) -> str: ...
    @property
    def warmup_steps(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def accumulate(self) -> int: ...
    @property
    def epochs(self) -> int: ...
    @property
    def steps(self) -> int | None: ...
    @property
    def betas(self) -> tuple[float, float]: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def clip_norm(self) -> float | None: ...
    @property
    def precision(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def log_every(self) -> int: ...
    # fmt: on


def check_optimizer_options(config: OptimizerOptions, must: Callable[[bool, str, object], None]) -> None:
    """``must(holds, what must hold, what came)`` raises."""
    must(config.precision in PRECISIONS, f"precision must be one of {', '.join(PRECISIONS)}", repr(config.precision))
    must(config.schedule in ("cosine", "constant"), "schedule must be cosine or constant", repr(config.schedule))
    must(0 < config.lr < math.inf, "lr must be positive and finite", config.lr)
    must(0 <= config.min_lr <= config.lr, f"min_lr must be from 0 to lr = {config.lr}", config.min_lr)
    must(0 <= config.weight_decay < math.inf, "weight_decay must not be negative", config.weight_decay)
    must(all(0 <= b < 1 for b in config.betas), "betas must be in [0, 1)", config.betas)
    must(config.clip_norm is None or config.clip_norm > 0, "clip_norm must be positive or None", config.clip_norm)
    must(config.warmup_steps >= 0, "warmup_steps must not be negative", config.warmup_steps)
    must(0 <= config.seed < 2**63, "seed must be from 0 to 2^63 - 1", config.seed)
    for name in ("batch_size", "accumulate", "epochs", "steps", "log_every"):
        value = getattr(config, name)
        optional = value is None and name == "steps"
        must(optional or (type(value) is int and value >= 1), f"{name} must be a positive integer", value)


def start_adamw(model: Model, config: OptimizerOptions) -> TrainState[Model]:
    """The state before the first step of training ``model`` on the device that it is on."""
    optimizer = make_optimizer(
        model, "adamw", lr=config.lr, weight_decay=config.weight_decay, betas=config.betas, momentum=0.0
    )
    device = next(model.parameters()).device.type
    return TrainState(model, optimizer, torch.amp.GradScaler(device, enabled=config.precision == "float16"))


def steps_per_epoch(samples: int, config: OptimizerOptions) -> int:
    """Optimizer steps of one pass over the samples; the last may see fewer."""
    return -(-samples // config.batch_size)


def total_steps(samples: int, config: OptimizerOptions) -> int:
    """Optimizer steps of the whole training."""
    return config.steps or config.epochs * steps_per_epoch(samples, config)


def scheduled(step: int, config: OptimizerOptions, last: int) -> float:
    """The learning rate of step 0, 1, ..."""
    return learning_rate(
        step, peak=config.lr, minimum=config.min_lr, warmup=config.warmup_steps,
        total=last, cosine=config.schedule == "cosine",
    )  # fmt: skip


def seen_before(sizes: Tensor, step: int, config: OptimizerOptions) -> Tensor:  # (N,) -> ()
    """The sum of the sizes of all samples that steps 0 .. step - 1 saw."""
    epoch, position = divmod(step, steps_per_epoch(len(sizes), config))
    begun = epoch_order(len(sizes), config.seed, epoch)[: position * config.batch_size]
    return epoch * sizes.sum() + sizes[begun].sum()


def run_epochs(
    state: TrainState,
    samples: int,
    config: OptimizerOptions,
    procedure: str,  # what errors call it
    train_step: Callable[[Tensor], None],  # indices of a batch -> one optimizer step, its figures added to the window
    should_stop: Callable[[], bool],
) -> Iterator[dict[str, float]]:
    """Step to the end, each epoch in an order of its own; yield a row of metrics every ``log_every`` steps."""
    epoch_steps, last = steps_per_epoch(samples, config), total_steps(samples, config)
    order, began = None, time.perf_counter()
    while state.step < last and not should_stop():
        epoch, position = divmod(state.step, epoch_steps)
        if order is None or position == 0:
            order = epoch_order(samples, config.seed, epoch)
        train_step(order[position * config.batch_size : (position + 1) * config.batch_size])
        if state.step % config.log_every == 0 or state.step == last:
            yield _close_window(state, procedure) | {
                "epoch": state.step / epoch_steps,
                "train/seconds": time.perf_counter() - began,
            }
            began = time.perf_counter()
    check_finite(state, procedure)


def _close_window(state: TrainState, procedure: str) -> dict[str, float]:
    """The means over the steps since the last row, which this reads from the device; the window starts anew."""
    check_finite(state, procedure)
    row = {"step": state.step, "learning_rate": float(state.optimizer.param_groups[0]["lr"])}
    row["grad_norm"] = mean_norm(state.window.pop("grad_norm"))
    row |= {key: torch.stack(values).double().mean().item() for key, values in state.window.items()}
    state.window = {}
    return row
