"""Supervised training: minibatches of (input, target), a loss on logits, stochastic gradient descent or AdamW.

    w <- w - lr * d loss / d w                            "sgd", the whole of plain gradient descent
Sources: AdamW, Loshchilov & Hutter 2019, arXiv:1711.05101; half a cosine of learning rate, 2017, arXiv:1608.03983.
Legend: N samples, B batch, C classes.
"""

__all__ = [
    "EVALUATION_BATCH",
    "LOSSES",
    "REACH",
    "Shift",
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

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from primer_fast.train import cuda_graphs, steps
from primer_fast.train.parallel import ALONE, World
from primer_fast.train.settings import SupervisedConfig
from primer_fast.train.state import TrainState, generator
from primer_fast.train.steps import (
    apply_gradient,
    autocast,
    batches,
    record,
    run,
    set_learning_rate,
    steps_per_epoch,
    total_steps,
)

EVALUATION_BATCH = 4096
REACH = 2  # pixels that augmentation moves an image by, at most


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


class Shift:
    """Moves each image by a whole number of pixels, up to ``REACH`` each way; what comes in from outside is 0.

    Raises:
        ValueError: ``images`` are not (N, H, W).
    """

    def __init__(self, images: Tensor):  # (N, H, W)
        if images.ndim != 3:
            raise ValueError(f"Shift: images must be (N, H, W); got {tuple(images.shape)}")
        height, width = images.shape[1:]
        padded = F.pad(images, (REACH,) * 4)
        self.windows = padded.unfold(1, height, 1).unfold(2, width, 1)  # (N, 2 REACH + 1, 2 REACH + 1, H, W), a view

    def offsets(self, seed: int, epoch: int) -> Tensor:
        """(N, 2) int64: where in the padded image each window of ``epoch`` starts, a function of (seed, epoch)."""
        offsets = torch.randint(0, 2 * REACH + 1, (len(self.windows), 2), generator=generator(seed, 1, epoch))
        return offsets.to(self.windows.device)

    def __call__(self, index: Tensor, offsets: Tensor) -> Tensor:  # (B,), (B, 2) -> (B, H, W)
        return self.windows[index, offsets[:, 0], offsets[:, 1]]


def start(model: torch.nn.Module, config: SupervisedConfig) -> TrainState:
    """The state before the first step of training ``model`` on the device that it is on."""
    return steps.start(model, config, config.optimizer, config.momentum)


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
    epoch_steps, last = steps_per_epoch(samples, config), total_steps(samples, config)
    full = min(config.batch_size or samples, samples)
    step = cuda_graphs.recorded(
        update, state, asked=config.cuda_graphs, batch=full, rows=full // config.accumulate, procedure="supervised"
    )
    seen: list[int] = []  # sizes of the batches since the last row

    def chosen() -> Iterator[tuple[Tensor, Tensor]]:
        of_epoch, offsets = -1, torch.empty(0)
        for epoch, position, index in batches(state.step, samples, config, device):
            if augment is None:
                x = inputs.index_select(0, index)
            else:
                if epoch != of_epoch:
                    of_epoch, offsets = epoch, augment.offsets(config.seed, epoch)
                x = augment(index, offsets[position * full :][: len(index)])
            yield scaled(x), targets.index_select(0, index)

    def train_on(batch: tuple[Tensor, Tensor]) -> None:
        train_step(state, *batch, config, last, step)
        seen.append(len(batch[0]))

    rows = run(
        state, config, last, chosen(), train_on, should_stop, prefix="train/",
        is_logged=lambda number: is_logged(number, samples, config),
        figures=lambda window: _figures(window, state.step, samples, config),
    )  # fmt: skip
    for row in rows:
        row |= {"epoch": state.step / epoch_steps, "train/samples_per_second": sum(seen) / row["train/seconds"]}
        if test is not None and (state.step % epoch_steps == 0 or state.step == last):
            row["test/loss"], row["test/accuracy"] = evaluate(state.whole(), *test, config, state.world)
        yield row
        seen.clear()


def update(state: TrainState, x: Tensor, target: Tensor, config: SupervisedConfig) -> None:
    """One optimizer step on one batch; its loss, right answers and gradient norm are appended to ``state.window``."""
    state.optimizer.zero_grad()
    loss: Any = 0
    correct: Any = 0
    for micro in state.micro_batches(len(x), config.accumulate):
        with autocast(x.device.type, config.precision):
            logits = state.forward(torch.nn.Module.__call__, x[micro.rows])
        # The sum over the micro-batch divided by the whole batch: a mean of means would overweight a short last one.
        part = micro.counted(loss_of(config)(logits, target[micro.rows], reduction="sum") / len(x))
        state.backward(part)
        loss = loss + part.detach()
        correct = correct + micro.counted(correct_count(logits.detach(), target[micro.rows]))
    norm = apply_gradient(state, config.clip_norm)
    record(state, **state.world.sum(loss=loss, correct=correct), grad_norm=norm)


def train_step(
    state: TrainState, x: Tensor, target: Tensor, config: SupervisedConfig, last: int, step: cuda_graphs.Update = update
) -> None:
    """``step``, which is ``update`` or a recording of it, at the learning rate of its number."""
    set_learning_rate(state, config, last)
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
    (micro,) = world.micro_batches(len(inputs), 1)
    logits = predict(model, inputs[micro.rows], config)
    part = targets[micro.rows].to(logits.device)
    total = world.sum(
        loss=micro.counted(LOSSES[config.loss](logits, part, reduction="sum")),
        right=micro.counted(correct_count(logits, part)),
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


def _figures(window: dict[str, Tensor], step: int, samples: int, config: SupervisedConfig) -> dict[str, float]:
    """Loss and accuracy over the samples of the steps before ``step`` whose sums or means are in the window."""
    batch, epoch = config.batch_size or samples, steps_per_epoch(samples, config)
    numbers = range(step - len(window["loss"]), step)
    sizes = [min(batch, samples - number % epoch * batch) for number in numbers]
    loss, correct = window["loss"].cpu(), window["correct"].cpu()
    return {
        "loss": (loss * torch.tensor(sizes)).sum().item() / sum(sizes), "accuracy": correct.sum().item() / sum(sizes)
    }  # fmt: skip
