"""What training procedures share: state, schedule, data order, precision, checks, and the state as plain tensors."""

__all__ = [
    "AUTOCAST",
    "FORMAT",
    "TrainState",
    "apply_gradient",
    "autocast",
    "check_finite",
    "clip_gradient",
    "epoch_order",
    "generator",
    "learning_rate",
    "make_optimizer",
    "mean_norm",
    "pack",
    "random_states",
    "record",
    "sent",
    "set_learning_rate",
    "set_random_states",
    "state_metadata",
    "state_tensors",
    "unpack",
    "weights_are_finite",
]

import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Generic

import numpy as np
import torch
from torch import Tensor

from primer_fast.train.distributed import Model, Parallel, local, placed_like, whole
from primer_fast.train.world import Share, World

FORMAT = "primer_fast checkpoint 1"
AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class TrainState(Generic[Model]):
    """Everything that the next step depends on, apart from the data and the configuration."""

    model: Model
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0  # optimizer steps made
    window: dict[str, list[Tensor]] = field(default_factory=dict)  # () tensors, one a step since the last logged one
    parallel: Parallel = field(default_factory=Parallel)  # how the processes share the model: distributed.distribute

    @property
    def world(self) -> World:
        return self.parallel.world

    def forward(self, function: Callable, *args: Any, **options: Any) -> Any:
        """``function(model, *args)`` as the forward pass of a training step."""
        return self.parallel.forward(self.model, function, *args, **options)

    def whole(self) -> Model:
        """The model with all its weights in this process, for other use than training steps: all processes call it."""
        return self.parallel.whole(self.model)

    def shares(self, count: int, accumulate: int) -> Iterator[Share]:
        """``World.shares``; what the body of the loop puts through ``backward`` is added up over the processes."""
        return self.parallel.shares(count, accumulate)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``, this process's term of the batch's loss."""
        self.scaler.scale(self.parallel.scaled(loss)).backward()


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


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """On a GPU as the float32 that a CUDA graph reads there, so that one trains as kernels launched one by one do."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = float(np.float32(lr)) if group["params"][0].is_cuda else lr


def sent(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on ``device``, without a wait: from memory that is not pinned a copy to a GPU would wait for it."""
    return (x.pin_memory() if x.is_cpu and device.type == "cuda" else x).to(device, non_blocking=True)


def autocast(device: str, precision: str) -> AbstractContextManager:
    """The arithmetic of the model in ``precision``; weights, losses and updates stay float32."""
    dtype = AUTOCAST.get(precision)
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


def mean_norm(norms: list[Tensor]) -> float:
    """The mean of the gradient norms that are finite: a loss scaler skips steps whose gradient overflows."""
    stacked = torch.stack(norms).double().cpu()
    finite = stacked[stacked.isfinite()]
    return finite.mean().item() if len(finite) else math.inf


def generator(seed: int, *stream: int) -> torch.Generator:
    """A CPU generator for one purpose: the same (seed, stream) gives the same numbers, any other unrelated ones."""
    word = np.random.SeedSequence(seed, spawn_key=stream).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(word) >> 1)  # torch takes 63 bits


def epoch_order(samples: int, seed: int, epoch: int) -> Tensor:
    """(samples,) int64: the order in which ``epoch`` visits the samples, a function of (seed, epoch) alone."""
    return torch.randperm(samples, generator=generator(seed, 0, epoch))


def pack(state: TrainState, config: dict, epoch: float) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state as what a safetensors file holds: named tensors (copies on the CPU) and strings.

    Names: ``model.<as in its state dict>``, ``optimizer.<parameter>.<value>``, ``window.<metric>``, ``rng.<device>``,
    and of the processes after the first ``rng.<device>.<rank>``. All processes call it; the first gets it.
    """
    tensors, metadata = state_tensors(state), state_metadata(state, config, epoch)
    for states in state.world.collect(random_states(state.world)):
        tensors |= {f"rng.{name}": t for name, t in states.items()}
    packed = {}
    for name, t in tensors.items():
        t = whole(t.detach())
        if state.world.rank == 0:
            packed[name] = t.to("cpu", copy=True).contiguous()
    return packed, metadata


def state_tensors(state: TrainState) -> dict[str, Tensor]:
    """The state but for the random numbers, as it lies in this process."""
    names: dict[Tensor, str] = {p: name for name, p in state.model.named_parameters()}
    tensors = {f"model.{name}": t for name, t in state.model.state_dict().items()}
    for p, values in state.optimizer.state.items():
        tensors |= {f"optimizer.{names[p]}.{key}": v for key, v in values.items() if v is not None}
    tensors |= {f"window.{key}": torch.stack(values) for key, values in state.window.items() if values}
    return tensors


def state_metadata(state: TrainState, config: dict, epoch: float) -> dict[str, str]:
    """The strings of a checkpoint: how far training is, and with what settings."""
    return {
        "format": FORMAT,
        "progress": json.dumps({"step": state.step, "epoch": epoch}),
        "optimizer": type(state.optimizer).__name__,
        "scaler": json.dumps(state.scaler.state_dict()),
        "config": json.dumps(config),
    }


def random_states(world: World) -> dict[str, Tensor]:
    """Where this process's generators are: "cpu" and "cuda", with ".<rank>" after the first process."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {name + (f".{world.rank}" if world.rank else ""): t for name, t in states.items()}


def set_random_states(world: World, states: dict[str, Tensor], step: int) -> None:
    """Inverse of ``random_states`` of all processes; a number of processes that was another starts new streams."""
    if sum(name.startswith("cpu") for name in states) != world.size and world.rank:
        torch.manual_seed(generator(step, 5, world.rank).initial_seed())
        return
    suffix = f".{world.rank}" if world.rank else ""
    torch.set_rng_state(states[f"cpu{suffix}"])
    if f"cuda{suffix}" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[f"cuda{suffix}"])


def unpack(state: TrainState, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Put ``state`` and the random number generators where ``pack`` found them; all is checked before any changes.

    Raises:
        ValueError: not what ``pack`` makes, or made from another model, optimizer or precision.
    """
    progress, scaler = _read_metadata(state, metadata)
    parts = {part: _part(tensors, part) for part in ("model", "optimizer", "window", "rng")}
    _check_model(state.model, parts["model"])
    values = _optimizer_values(state, parts["optimizer"], progress["step"])
    if parts["rng"].get("cpu", torch.empty(0)).shape != torch.get_rng_state().shape:
        raise ValueError("the state of the CPU's random number generator is missing or of another size")

    ours = state.model.state_dict()
    state.model.load_state_dict({name: placed_like(ours[name], t) for name, t in parts["model"].items()})
    content = state.optimizer.state_dict()
    content["state"] = values
    state.optimizer.load_state_dict(content)
    if scaler:
        state.scaler.load_state_dict(scaler)
    state.step = progress["step"]
    device = next(state.model.parameters()).device
    state.window = {key: list(stack.to(device).unbind()) for key, stack in parts["window"].items()}
    set_random_states(state.world, parts["rng"], state.step)


def _part(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}."): t for name, t in tensors.items() if name.startswith(f"{part}.")}


def _read_metadata(state: TrainState, metadata: dict[str, str]) -> tuple[dict, dict]:
    if metadata.get("format") != FORMAT:
        raise ValueError(f"not a checkpoint of this version: format must be {FORMAT!r}; got {metadata.get('format')!r}")
    try:
        progress, scaler = json.loads(metadata["progress"]), json.loads(metadata["scaler"])
        if type(progress["step"]) is not int or progress["step"] < 0:
            raise ValueError(f"step {progress['step']!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"damaged metadata ({error})") from error
    optimizer = type(state.optimizer).__name__
    if metadata.get("optimizer") != optimizer:
        raise ValueError(f"made with the optimizer {metadata.get('optimizer')}, but this run uses {optimizer}")
    if bool(scaler) != state.scaler.is_enabled():
        raise ValueError("made with another precision: one of the two runs scales its loss, the other does not")
    return progress, scaler


def _check_model(model: torch.nn.Module, saved: dict[str, Tensor]) -> None:
    for name, want in model.state_dict().items():
        if name not in saved:
            raise ValueError(f"made from another model: it has no {name}, which this model has")
        got = saved[name]
        if got.shape != want.shape or got.dtype != want.dtype:
            ours, theirs = f"{tuple(want.shape)} {want.dtype}", f"{tuple(got.shape)} {got.dtype}"
            raise ValueError(f"made from another model: its {name} is {theirs}, this model's is {ours}")
    for name in saved.keys() - model.state_dict().keys():
        raise ValueError(f"made from another model: it has {name}, which this model does not have")


def _optimizer_values(state: TrainState, saved: dict[str, Tensor], step: int) -> dict[int, dict[str, Tensor]]:
    """The saved values by the index that the optimizer's own state dict gives each parameter."""
    names: dict[Tensor, str] = {p: name for name, p in state.model.named_parameters()}
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    values = {i: _part(saved, names[p]) for i, p in enumerate(parameters)}
    keys = {frozenset(v) for v in values.values()}
    adam = isinstance(state.optimizer, torch.optim.AdamW)
    want = {"step", "exp_avg", "exp_avg_sq"} if adam else {"momentum_buffer"}
    stateless = not adam and state.optimizer.defaults["momentum"] == 0
    empty = stateless or step == 0 or state.scaler.is_enabled()  # a scaler may have skipped every step so far
    if keys != {frozenset(want)} and not (empty and keys == {frozenset()}):
        raise ValueError(f"the state of the optimizer is incomplete: every parameter needs {', '.join(sorted(want))}")
    for i, p in enumerate(parameters):
        for key, value in values[i].items():
            if key != "step" and value.shape != p.shape:
                got = tuple(value.shape)
                raise ValueError(f"the optimizer's {key} of {names[p]} must be {tuple(p.shape)}; it is {got}")
            if key != "step":  # in the memory format of p, which fused optimizers take for granted
                value = placed_like(p, value)
                values[i][key] = torch.empty_like(p, dtype=value.dtype, device=value.device).copy_(value)
    return values
