"""What the procedures on a fixed set of samples share: supervised fine-tuning, reward modelling, DPO.

Batches are a function of (seed, step); metrics are means over the steps since the row before.
"""

__all__ = [
    "run_epochs",
    "scheduled",
    "seen_before",
    "start_adamw",
    "steps_per_epoch",
    "total_steps",
]

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from primer_fast.train.common import (
    Model,
    TrainState,
    check_finite,
    epoch_order,
    learning_rate,
    make_optimizer,
    mean_norm,
)
from primer_fast.train.settings import Optimisation


def start_adamw(model: Model, config: Optimisation) -> TrainState[Model]:
    """The state before the first step of training ``model`` on the device that it is on."""
    optimizer = make_optimizer(
        model, "adamw", lr=config.lr, weight_decay=config.weight_decay, betas=config.betas, momentum=0.0
    )
    device = next(model.parameters()).device.type
    return TrainState(model, optimizer, torch.amp.GradScaler(device, enabled=config.precision == "float16"))


def steps_per_epoch(samples: int, config: Optimisation) -> int:
    """Optimizer steps of one pass over the samples; the last may see fewer."""
    return -(-samples // (config.batch_size or samples))


def total_steps(samples: int, config: Optimisation) -> int:
    """Optimizer steps of the whole training."""
    return config.steps or config.epochs * steps_per_epoch(samples, config)


def scheduled(step: int, config: Optimisation, last: int) -> float:
    """The learning rate of step 0, 1, ..."""
    return learning_rate(
        step, peak=config.lr, minimum=config.min_lr, warmup=config.warmup_steps,
        total=last, cosine=config.schedule == "cosine",
    )  # fmt: skip


def seen_before(sizes: Tensor, step: int, config: Optimisation) -> Tensor:  # (N,) -> ()
    """The sum of the sizes of all samples that steps 0 .. step - 1 saw."""
    epoch, position = divmod(step, steps_per_epoch(len(sizes), config))
    begun = epoch_order(len(sizes), config.seed, epoch)[: position * (config.batch_size or len(sizes))]
    return epoch * sizes.sum() + sizes[begun].sum()


def run_epochs(
    state: TrainState,
    samples: int,
    config: Optimisation,
    procedure: str,  # what errors call it
    train_step: Callable[[Tensor], None],  # indices of a batch -> one optimizer step, its figures added to the window
    should_stop: Callable[[], bool],
) -> Iterator[dict[str, float]]:
    """Step to the end, each epoch in an order of its own; yield a row of metrics every ``log_every`` steps."""
    batch, epoch_steps, last = config.batch_size or samples, steps_per_epoch(samples, config), total_steps(samples, config)
    order, began = None, time.perf_counter()
    while state.step < last and not should_stop():
        epoch, position = divmod(state.step, epoch_steps)
        if order is None or position == 0:
            order = epoch_order(samples, config.seed, epoch)
        train_step(order[position * batch : (position + 1) * batch])
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
