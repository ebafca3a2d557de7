"""Supervised training: minibatches of (input, target), a loss on logits, stochastic gradient descent or AdamW.

    w <- w - lr * d loss / d w                            "sgd", the whole of plain gradient descent
Sources: AdamW, Loshchilov & Hutter 2019, arXiv:1711.05101; half a cosine of learning rate, 2017, arXiv:1608.03983.
Legend: N samples, B batch, C classes.
"""

__all__ = [
    "EVALUATION_BATCH",
    "LOSSES",
    "SupervisedConfig",
    "binary_cross_entropy",
    "correct_count",
    "cross_entropy",
    "evaluate",
    "is_logged",
    "loss_of",
    "predict",
    "scaled",
    "start",
    "steps_per_epoch",
    "total_steps",
    "train",
    "train_step",
    "update",
]

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from primer_fast.train import cuda_graphs
from primer_fast.train.augmentation import Shift
from primer_fast.train.common import (
    TrainState,
    apply_gradient,
    autocast,
    check_finite,
    epoch_order,
    learning_rate,
    make_optimizer,
    mean_norm,
    record,
    set_learning_rate,
)
from primer_fast.train.settings import SupervisedConfig
from primer_fast.train.world import ALONE, World

EVALUATION_BATCH = 4096


def cross_entropy(
    logits: Tensor,  # (B, C)
    target: Tensor,  # (B,) int64, the class
    *,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:  # ()
    """-sum_c q_c log softmax(logits)_c in float32; q is 1 at the target, else 0, or 1 - s + s/C and s/C if smoothed."""
    return F.cross_entropy(logits.float(), target, label_smoothing=label_smoothing, reduction=reduction)


def binary_cross_entropy(
    logits: Tensor,  # (B,) or (B, 1)
    target: Tensor,  # (B,), 0 to 1
    *,
    reduction: str = "mean",
) -> Tensor:  # ()
    """-(y log p + (1 - y) log(1 - p)) with p = sigmoid(logit), in float32 and without overflow at any logit.

    Erratum: the primer prints -y log p + (1 - y) log(1 - p). The minus sign belongs to both terms: as printed, the
    second would reward certainty in the wrong answer without bound.
    """
    return F.binary_cross_entropy_with_logits(logits.float().view(target.shape), target.float(), reduction=reduction)


def correct_count(logits: Tensor, target: Tensor) -> Tensor:  # (B, C) or (B, 1), (B,) -> () int64
    """How many predictions are right: the largest logit, or the sign of the only one."""
    predicted = logits.argmax(dim=1) if logits.shape[1] > 1 else logits[:, 0] > 0
    return (predicted == target).sum()


LOSSES = {"cross_entropy": cross_entropy, "binary_cross_entropy": binary_cross_entropy}


def start(model: torch.nn.Module, config: SupervisedConfig) -> TrainState:
    """The state before the first step of training ``model`` on the device that it is on."""
    optimizer = make_optimizer(
        model, config.optimizer, lr=config.lr, weight_decay=config.weight_decay,
        betas=config.betas, momentum=config.momentum,
    )  # fmt: skip
    device = next(model.parameters()).device.type
    return TrainState(model, optimizer, torch.amp.GradScaler(device, enabled=config.precision == "float16"))


def steps_per_epoch(samples: int, config: SupervisedConfig) -> int:
    """Optimizer steps of one pass over the samples; the last may see fewer."""
    return -(-samples // (config.batch_size or samples))


def total_steps(samples: int, config: SupervisedConfig) -> int:
    """Optimizer steps of the whole training."""
    return config.steps or config.epochs * steps_per_epoch(samples, config)


def is_logged(step: int, samples: int, config: SupervisedConfig) -> bool:
    """Whether a row of metrics follows optimizer step number ``step`` (1, 2, ...).

    Every ``log_every`` steps of an epoch and its last; where an epoch is shorter, the last of every so many epochs.
    """
    epoch = steps_per_epoch(samples, config)
    if step == total_steps(samples, config):
        return True
    if epoch > config.log_every:
        return step % epoch % config.log_every == 0
    return step % (epoch * (config.log_every // epoch)) == 0


def train(
    state: TrainState,
    inputs: Tensor,  # (N, ...) float, or uint8, which is divided by 255
    targets: Tensor,  # (N,): int64 for cross_entropy, 0 to 1 for binary_cross_entropy
    config: SupervisedConfig,
    *,
    test: tuple[Tensor, Tensor] | None = None,  # inputs and targets, measured at the end of an epoch
    should_stop: Callable[[], bool] = lambda: False,  # asked after each step
) -> Iterator[dict[str, float]]:
    """Go on from ``state`` to the last step; yield one dict of metrics per logged step.

    ``train/loss``, ``train/accuracy`` and ``train/grad_norm`` (before clipping) are means over the steps since the row
    before, as they were seen in training; ``train/seconds`` is the time those steps took. Which samples a step sees
    is a function of (seed, step), so that a state resumed from ``pack`` goes on bit for bit.

    Raises:
        ValueError: inputs and targets that do not fit each other or the configuration.
        FloatingPointError: the loss, the gradient or a weight is no longer finite; says at which step.
    """
    samples = len(inputs)
    if samples == 0 or targets.shape != (samples,):
        got = f"inputs {tuple(inputs.shape)} and targets {tuple(targets.shape)}"
        raise ValueError(f"supervised: targets must be (N,), one per input, N > 0; got {got}")
    device = next(state.model.parameters()).device
    inputs, targets = inputs.to(device), targets.to(device)
    augment = Shift(inputs) if config.augmentation == "shift" else None
    batch, epoch_steps, last = (
        config.batch_size or samples,
        steps_per_epoch(samples, config),
        total_steps(samples, config),
    )
    full = min(batch, samples)
    step = cuda_graphs.recorded(
        update, state, asked=config.cuda_graphs, batch=full, rows=full // config.accumulate, procedure="supervised"
    )
    order = None
    began, seen = time.perf_counter(), 0
    while state.step < last and not should_stop():
        epoch, position = divmod(state.step, epoch_steps)
        if order is None or position == 0:
            order = epoch_order(samples, config.seed, epoch).to(device)
            offsets = augment.offsets(config.seed, epoch) if augment else None
        chosen = slice(position * batch, (position + 1) * batch)
        index = order[chosen]
        x = augment(index, offsets[chosen]) if augment and offsets is not None else inputs.index_select(0, index)
        train_step(state, scaled(x), targets.index_select(0, index), config, last, step)
        seen += len(index)
        if is_logged(state.step, samples, config):
            row = _close_window(state, samples, config)
            seconds = time.perf_counter() - began
            row |= {"train/seconds": seconds, "train/samples_per_second": seen / seconds}
            if test is not None and (state.step % epoch_steps == 0 or state.step == last):
                row["test/loss"], row["test/accuracy"] = evaluate(state.whole(), *test, config, state.world)
            yield row
            began, seen = time.perf_counter(), 0
    check_finite(state, "supervised")


def update(state: TrainState, x: Tensor, target: Tensor, config: SupervisedConfig) -> None:
    """One optimizer step on one batch; its loss, right answers and gradient norm are appended to ``state.window``."""
    state.optimizer.zero_grad()
    loss: Any = 0
    correct: Any = 0
    for share in state.shares(len(x), config.accumulate):
        with autocast(x.device.type, config.precision):
            logits = state.forward(torch.nn.Module.__call__, x[share.rows])
        # The sum over the micro-batch divided by the whole batch: a mean of means would overweight a short last one.
        part = share.of(loss_of(config)(logits, target[share.rows], reduction="sum") / len(x))
        state.backward(part)
        loss = loss + part.detach()
        correct = correct + share.of(correct_count(logits.detach(), target[share.rows]))
    norm = apply_gradient(state, config.clip_norm)
    record(state, **state.world.sum(loss=loss, correct=correct), grad_norm=norm)


def train_step(
    state: TrainState, x: Tensor, target: Tensor, config: SupervisedConfig, last: int, step: cuda_graphs.Update = update
) -> None:
    """``step``, which is ``update`` or a recording of it, at the learning rate of its number."""
    lr = learning_rate(
        state.step, peak=config.lr, minimum=config.min_lr, warmup=config.warmup_steps,
        total=last, cosine=config.schedule == "cosine",
    )  # fmt: skip
    set_learning_rate(state.optimizer, lr)
    step(state, x, target, config)


@torch.no_grad()
def predict(model: torch.nn.Module, inputs: Tensor, config: SupervisedConfig) -> Tensor:
    """Logits (N, C) in float32 for ``inputs`` (N, ...), in batches, on the device of the model."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    with autocast(device.type, config.precision):
        logits = [model(scaled(x.to(device))).float() for x in inputs.split(EVALUATION_BATCH)]
    model.train(training)
    return torch.cat(logits)


def evaluate(
    model: torch.nn.Module, inputs: Tensor, targets: Tensor, config: SupervisedConfig, world: World = ALONE
) -> tuple[float, float]:
    """Mean loss (without label smoothing) and accuracy, 0 to 1. world: of processes, each of which takes a part."""
    if world.size == 1:
        logits = predict(model, inputs, config)
        targets = targets.to(logits.device)
        return LOSSES[config.loss](logits, targets).item(), correct_count(logits, targets).item() / len(targets)
    (share,) = world.shares(len(inputs), 1)
    logits = predict(model, inputs[share.rows], config)
    part = targets[share.rows].to(logits.device)
    total = world.sum(
        loss=share.of(LOSSES[config.loss](logits, part, reduction="sum")), right=share.of(correct_count(logits, part))
    )
    return total["loss"].item() / len(targets), total["right"].item() / len(targets)


def loss_of(config: SupervisedConfig) -> Callable[..., Tensor]:
    """The loss that training minimises, with the label smoothing of ``config``."""
    if config.label_smoothing == 0:
        return LOSSES[config.loss]
    return lambda *args, **kwargs: cross_entropy(*args, label_smoothing=config.label_smoothing, **kwargs)


def scaled(x: Tensor) -> Tensor:
    """Bytes as fractions of 255; any other tensor as it is."""
    return x.float().div_(255) if x.dtype == torch.uint8 else x


def _close_window(state: TrainState, samples: int, config: SupervisedConfig) -> dict[str, float]:
    """The means over the steps since the last row, which this reads from the device; the window starts anew."""
    check_finite(state, "supervised")
    steps = range(state.step - len(state.window["loss"]), state.step)
    batch, epoch = config.batch_size or samples, steps_per_epoch(samples, config)
    sizes = [min(batch, samples - step % epoch * batch) for step in steps]
    loss, correct = (torch.stack(state.window[key]).double().cpu() for key in ("loss", "correct"))
    norm = mean_norm(state.window["grad_norm"])
    state.window = {}
    return {
        "step": state.step,
        "epoch": state.step / epoch,
        "train/loss": (loss * torch.tensor(sizes)).sum().item() / sum(sizes),
        "train/accuracy": correct.sum().item() / sum(sizes),
        "train/grad_norm": norm,
        "train/learning_rate": float(state.optimizer.param_groups[0]["lr"]),
    }
