"""The state of a training: in this process, on many devices, and as the plain tensors of a checkpoint.

On many devices DDP holds all of the model in each process, FSDP a part of every tensor. Gradients are sums over the
processes of what each one's rows contribute to the loss of the whole batch, so that a step is the step that one process
makes on that batch.
Sources: Li et al. 2020, arXiv:2006.15704 (DDP); Zhao et al. 2023, arXiv:2304.11277 (FSDP).
"""

__all__ = [
    "FORMAT",
    "STRATEGIES",
    "Entry",
    "Model",
    "TrainState",
    "distribute",
    "generator",
    "pack",
    "random_states",
    "set_random_states",
    "state_metadata",
    "state_tensors",
    "unpack",
]

import copy
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from primer_fast.train.parallel import ALONE, MicroBatch, World, placed_like, whole

Model = TypeVar("Model", bound=torch.nn.Module)

FORMAT = "primer_fast checkpoint 1"
STRATEGIES = ("none", "ddp", "fsdp")


class Entry(torch.nn.Module):
    """A forward through whatever functions and methods of the model the loss needs.

    DDP and FSDP prepare a pass where their module is called; the losses here enter models by ``hidden``, ``loss`` or
    ``log_prob_of``, and by several of them in one pass.
    """

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, function: Callable, *args: Any, **options: Any) -> Any:
        return function(self.model, *args, **options)


@dataclass
class TrainState(Generic[Model]):
    """Everything that the next step depends on, apart from the data and the configuration.

    ``distribute`` makes it the state of one process of several.
    """

    model: Model
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0  # optimizer steps made
    window: dict[str, list[Tensor]] = field(default_factory=dict)  # () tensors, one a step since the last logged one
    world: World = ALONE  # the processes that train this model
    entry: torch.nn.Module | None = None  # under DDP or FSDP: an Entry
    template: Any = None  # under FSDP: the model without weights

    @property
    def is_sharded(self) -> bool:
        """Whether no process has all of the model."""
        return self.template is not None

    def micro_batches(self, count: int, accumulate: int) -> Iterator[MicroBatch]:
        """``World.micro_batches``, for a loop whose gradients are added up over the processes.

        DDP does so after the last of them, FSDP, which keeps only parts of a gradient, after each.
        """
        every = list(self.world.micro_batches(count, accumulate))
        for micro in every:
            waits = isinstance(self.entry, DistributedDataParallel) and micro is not every[-1]
            with self.entry.no_sync() if waits else nullcontext():  # type: ignore[union-attr, operator]
                yield micro

    def forward(self, function: Callable, *args: Any, **options: Any) -> Any:
        """``function(model, *args)`` as the forward pass of a training step."""
        if self.entry is None:
            return function(self.model, *args, **options)
        return self.entry(function, *args, **options)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``, this process's term of the batch's loss."""
        if self.entry is not None:
            loss = loss * self.world.size  # DDP and FSDP take the mean over the processes; a sum is wanted
        self.scaler.scale(loss).backward()

    def whole(self) -> Model:
        """The model with all its weights in this process, for other use than training steps: all processes call it.

        Under FSDP it is a copy, which goes when the caller lets it go.
        """
        if self.template is None:
            return self.model
        gathered = copy.deepcopy(self.template)
        gathered.load_state_dict({name: whole(t).detach() for name, t in self.model.state_dict().items()}, assign=True)
        return gathered.train(self.model.training)


def distribute(state: TrainState, world: World, strategy: str) -> None:
    """Share the model of ``state``, which is the same in all processes and was not trained yet, and its optimizer.

    FSDP gathers one block at a time, and what is outside of blocks for the length of a step: an embedding that is tied
    with the output among it.

    Args:
        strategy: "none", "ddp" or "fsdp".

    Raises:
        ValueError: another strategy, or "none" for several processes.
    """
    if strategy not in STRATEGIES or (strategy == "none" and world.size > 1):
        raise ValueError(f"distribute: strategy must be ddp or fsdp, or none for one process; got {strategy!r}")
    state.world = world
    if strategy == "none":
        return
    model, optimizer, entry = state.model, state.optimizer, Entry(state.model)
    if strategy == "ddp":
        # Buffers are the same in all processes without a broadcast in every forward; newer versions rename the option.
        options = inspect.signature(DistributedDataParallel).parameters
        buffers: dict[str, Any] = {
            "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers": False
        }
        state.entry = DistributedDataParallel(entry, **buffers)
        return
    # Imported here: it takes a second, which one process need not wait for.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    names = {p: name for name, p in model.named_parameters()}
    device = next(model.parameters()).device.type
    for p in model.parameters():
        p.data = p.data.contiguous()  # FSDP takes no other, as channels_last
    template = copy.deepcopy(model)
    for module in template.modules():
        for name, p in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad))
    mesh = init_device_mesh(device, (world.size,))
    for module in model.modules():
        for block in getattr(module, "blocks", ()):
            fully_shard(list(block.children()), mesh=mesh)  # a group: it is these that are called, not the block
    fully_shard(entry, mesh=mesh)
    sharded = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [sharded[names[p]] for p in group["params"]]
        if isinstance(optimizer, torch.optim.SGD):  # the fused kernel of SGD knows no sharded weights
            group["fused"] = optimizer._step_supports_amp_scaling = False
    state.entry, state.template = entry, template


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


def generator(seed: int, *stream: int) -> torch.Generator:
    """A CPU generator for one purpose: the same (seed, stream) gives the same numbers, any other unrelated ones.

    The streams begin with 0 for the order of an epoch, 1 for augmentation, 2 for windows of text, 3 for rollouts, 4 for
    their minibatches, 5 for the dropout of processes, 6 for what is held out.
    """
    word = np.random.SeedSequence(seed, spawn_key=stream).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(word) >> 1)  # torch takes 63 bits


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
