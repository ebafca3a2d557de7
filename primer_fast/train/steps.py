"""What training steps share: the optimizer and its learning rate, the order of the samples, the rows of metrics.

Batches are a function of (seed, step), so that a run can be stopped and resumed anywhere.
"""

__all__ = [
    "apply_gradient",
    "autocast",
    "batches",
    "check_finite",
    "clip_gradient",
    "close_window",
    "epoch_order",
    "learning_rate",
    "make_optimizer",
    "mean_norm",
    "record",
    "run",
    "run_epochs",
    "seen_before",
    "sent",
    "set_learning_rate",
    "start",
    "steps_per_epoch",
    "total_steps",
    "weights_are_finite",
]

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from primer_fast.train.parallel import local, whole
from primer_fast.train.settings import Optimisation
from primer_fast.train.state import Model, TrainState, generator

Batch = TypeVar("Batch")


def start(model: Model, config: Optimisation, optimizer: str = "adamw", momentum: float = 0.0) -> TrainState[Model]:
    """The state before the first step of training ``model`` on the device that it is on."""
    made = make_optimizer(
        model, optimizer, lr=config.lr, weight_decay=config.weight_decay, betas=config.betas, momentum=momentum
    )
    device = next(model.parameters()).device.type
    return TrainState(model, made, torch.amp.GradScaler(device, enabled=config.precision == "float16"))


def make_optimizer(
    model: torch.nn.Module, name: str, *, lr: float, weight_decay: float, betas: tuple[float, float], momentum: float
) -> torch.optim.Optimizer:
    """AdamW ("adamw") or w -= lr * grad with momentum ("sgd"); biases and other vectors do not decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, fused=fused)
    raise ValueError(f"make_optimizer: name must be 'adamw' or 'sgd'; got {name!r}")


def learning_rate(step: int, *, peak: float, minimum: float, warmup: int, total: int, cosine: bool) -> float:
    """Rate of step 0, 1, ...: a straight line up to ``peak`` at step ``warmup``, then constant or half a cosine.

    The cosine starts at ``peak`` and would reach ``minimum`` at step ``total``, one after the last.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if not cosine:
        return peak
    progress = (step - warmup) / max(1, total - warmup)
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(state: TrainState, config: Optimisation, last: int) -> None:
    """Give the optimizer the rate that ``config`` has for the next step of ``last``.

    On a GPU it is rounded to float32, as a CUDA graph reads it there, so that a recorded step equals a launched one.
    """
    lr = learning_rate(
        state.step, peak=config.lr, minimum=config.min_lr, warmup=config.warmup_steps,
        total=last, cosine=config.schedule == "cosine",
    )  # fmt: skip
    for group in state.optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = float(np.float32(lr)) if group["params"][0].is_cuda else lr


def sent(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on ``device``, without a wait: from memory that is not pinned a copy to a GPU would wait for it."""
    return (x.pin_memory() if x.is_cpu and device.type == "cuda" else x).to(device, non_blocking=True)


def autocast(device: str, precision: str) -> AbstractContextManager:
    """The arithmetic of the model in ``precision``; weights, losses and updates stay float32."""
    dtype = None if precision == "float32" else getattr(torch, precision)
    return torch.autocast(device, dtype=dtype, enabled=dtype is not None)


def clip_gradient(model: torch.nn.Module, clip_norm: float | None) -> Tensor:  # -> () norm of the whole gradient
    """Scale the gradient down to ``clip_norm`` where its norm is larger; the norm returned is that of before."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    if clip_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    return norm


def apply_gradient(state: TrainState, clip_norm: float | None) -> Tensor:  # -> () norm of the whole gradient
    """The optimizer step that ends a training step, from gradients that ``state.scaler`` may have scaled."""
    state.scaler.unscale_(state.optimizer)
    norm = clip_gradient(state.model, clip_norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.step += 1
    return norm


def record(state: TrainState, **values: Tensor) -> None:
    """Append what a step measured to the window, without waiting for the device."""
    for name, value in values.items():
        state.window.setdefault(name, []).append(value)


def check_finite(state: TrainState, procedure: str) -> None:
    """Raise FloatingPointError with the step if a loss or gradient since the last row, or a weight, is not finite."""
    if not state.window.get("loss"):
        return
    watched = {"loss": "loss"} if state.scaler.is_enabled() else {"loss": "loss", "gradient": "grad_norm"}
    bad = {what: ~torch.stack(state.window[key]).isfinite() for what, key in watched.items()}
    first = {what: int(steps.nonzero()[0]) for what, steps in bad.items() if steps.any()}
    if first:
        what = min(first, key=lambda name: first[name])  # a gradient spoils the losses after it
        step = state.step - len(state.window["loss"]) + first[what] + 1
        raise FloatingPointError(
            f"{procedure}: the {what} is not finite at step {step}; a lower lr or more warm-up helps"
        )
    if not weights_are_finite(state):
        raise FloatingPointError(f"{procedure}: a weight is not finite after step {state.step}; a lower lr helps")


def weights_are_finite(state: TrainState) -> bool:
    """Whether all are, in every process."""
    finite = torch.stack([local(p).isfinite().all() for p in state.model.parameters()]).all()
    return not state.world.any(not finite)


def mean_norm(norms: Tensor) -> float:  # (N,)
    """The mean of the gradient norms that are finite: a loss scaler skips steps whose gradient overflows."""
    norms = norms.cpu()
    finite = norms[norms.isfinite()]
    return finite.mean().item() if len(finite) else math.inf


def epoch_order(samples: int, seed: int, epoch: int) -> Tensor:
    """(samples,) int64: the order in which ``epoch`` visits the samples, a function of (seed, epoch) alone."""
    return torch.randperm(samples, generator=generator(seed, 0, epoch))


def steps_per_epoch(samples: int, config: Optimisation) -> int:
    """Optimizer steps of one pass over the samples; the last may see fewer."""
    return -(-samples // (config.batch_size or samples))


def total_steps(samples: int, config: Optimisation) -> int:
    """Optimizer steps of the whole training."""
    return config.steps or config.epochs * steps_per_epoch(samples, config)


def batches(
    step: int, samples: int, config: Optimisation, device: torch.device | str = "cpu"
) -> Iterator[tuple[int, int, Tensor]]:
    """From step number ``step`` on, without end: the epoch, the batch's number in it, the indices of its samples."""
    size, per_epoch = config.batch_size or samples, steps_per_epoch(samples, config)
    for epoch in itertools.count(step // per_epoch):
        order = epoch_order(samples, config.seed, epoch).to(device)
        for position in range(step % per_epoch if epoch == step // per_epoch else 0, per_epoch):
            yield epoch, position, order[position * size : (position + 1) * size]


def seen_before(sizes: Tensor, step: int, config: Optimisation) -> Tensor:  # (N,) -> ()
    """The sum of the sizes of all samples that steps 0 .. step - 1 saw."""
    epoch, position = divmod(step, steps_per_epoch(len(sizes), config))
    begun = epoch_order(len(sizes), config.seed, epoch)[: position * (config.batch_size or len(sizes))]
    return epoch * sizes.sum() + sizes[begun].sum()


def close_window(
    state: TrainState, procedure: str, figures: Callable[[dict[str, Tensor]], dict[str, float]] | None = None
) -> dict[str, float]:
    """What the steps since the last row measured, read from the device; the window starts anew.

    Args:
        figures: of the values of all steps by name; None: their means.
    """
    check_finite(state, procedure)
    window = {name: torch.stack(values).double() for name, values in state.window.items()}
    state.window = {}
    row = {
        "learning_rate": float(state.optimizer.param_groups[0]["lr"]),
        "grad_norm": mean_norm(window.pop("grad_norm")),
    }
    return row | (figures(window) if figures else {name: values.mean().item() for name, values in window.items()})


def run(
    state: TrainState,
    config: Optimisation,
    last: int,  # steps of the whole training
    every: Iterable[Batch],  # the batches from state.step on
    step: Callable[[Batch], Any],  # one optimizer step, whose figures it adds to the window
    should_stop: Callable[[], bool],
    *,
    is_logged: Callable[[int], bool] | None = None,  # whether a row follows step 1, 2, ...; None: by config.log_every
    prefix: str = "",  # of the names of figures
    figures: Callable[[dict[str, Tensor]], dict[str, float]] | None = None,  # of ``close_window``
) -> Iterator[dict[str, float]]:
    """Step to the end; yield a row of metrics, of the steps since the row before, after each step that is logged.

    Raises:
        FloatingPointError: the loss, the gradient or a weight is no longer finite; says at which step.
    """
    logged = is_logged or (lambda number: number % config.log_every == 0 or number == last)
    began = time.perf_counter()
    for batch in every:
        if state.step >= last or should_stop():
            break
        step(batch)
        if logged(state.step):
            row = close_window(state, config.procedure, figures)
            seconds = time.perf_counter() - began
            yield {"step": state.step, **{prefix + name: x for name, x in row.items()}, "train/seconds": seconds}
            began = time.perf_counter()
    check_finite(state, config.procedure)


def run_epochs(
    state: TrainState,
    samples: int,
    config: Optimisation,
    step: Callable[[Tensor], Any],  # takes the indices of a batch
    should_stop: Callable[[], bool],
) -> Iterator[dict[str, float]]:
    """``run`` over the samples, each epoch in an order of its own."""
    every = (index for _, _, index in batches(state.step, samples, config))
    for row in run(state, config, total_steps(samples, config), every, step, should_stop):
        yield row | {"epoch": row["step"] / steps_per_epoch(samples, config)}
