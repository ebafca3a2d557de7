"""One model on many devices: DDP holds all of it in each process, FSDP a part of every tensor.

Gradients are sums over the processes of what each one's rows contribute to the loss of the whole batch, so that a step
is the step that one process makes on that batch.
Sources: Li et al. 2020, arXiv:2006.15704 (DDP); Zhao et al. 2023, arXiv:2304.11277 (FSDP).
"""

__all__ = ["STRATEGIES", "Entry", "Model", "Parallel", "distribute", "is_sharded", "local", "placed_like", "whole"]

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from primer_fast.train.world import Share, World

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Model = TypeVar("Model", bound=torch.nn.Module)

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
class Parallel:
    """How the processes of ``world`` share a model; as it is by default, one process has it."""

    world: World = field(default_factory=World)
    entry: torch.nn.Module | None = None  # an Entry under DDP or FSDP
    template: Any = None  # of FSDP: the model without weights

    @property
    def is_sharded(self) -> bool:
        return self.template is not None

    def forward(self, model: torch.nn.Module, function: Callable, *args: Any, **options: Any) -> Any:
        return function(model, *args, **options) if self.entry is None else self.entry(function, *args, **options)

    def shares(self, count: int, accumulate: int) -> Iterator[Share]:
        """``World.shares``; DDP sums the gradients after the last of them, FSDP, which keeps only parts, after each."""
        shares, entry = list(self.world.shares(count, accumulate)), self.entry
        for share in shares:
            with (
                entry.no_sync()
                if isinstance(entry, DistributedDataParallel) and share is not shares[-1]
                else nullcontext()
            ):
                yield share

    def scaled(self, loss: Tensor) -> Tensor:
        """What has as the mean of its gradients over the processes, which DDP and FSDP take, the sum of ``loss``'s."""
        return loss if self.entry is None else loss * self.world.size

    def whole(self, model: Model) -> Model:
        """``model``, or under FSDP a copy of it with all its weights, which goes when the caller lets it go."""
        if self.template is None:
            return model
        gathered = copy.deepcopy(self.template)
        gathered.load_state_dict({name: whole(t).detach() for name, t in model.state_dict().items()}, assign=True)
        return gathered.train(model.training)


def distribute(model: torch.nn.Module, optimizer: torch.optim.Optimizer, world: World, strategy: str) -> Parallel:
    """Share ``model``, which is the same in all processes and was not trained yet, and its ``optimizer``, in place.

    FSDP gathers one block at a time, and what is outside of blocks for the length of a step: an embedding that is tied
    with the output among it.

    Args:
        strategy: "none", "ddp" or "fsdp".

    Raises:
        ValueError: another strategy, or "none" for several processes.
    """
    if strategy not in STRATEGIES or (strategy == "none" and world.size > 1):
        raise ValueError(f"distribute: strategy must be ddp or fsdp, or none for one process; got {strategy!r}")
    if strategy == "none":
        return Parallel(world)
    entry = Entry(model)
    if strategy == "ddp":
        # Buffers are the same in all processes without a broadcast in every forward; newer versions rename the option.
        options = inspect.signature(DistributedDataParallel).parameters
        buffers: dict[str, Any] = {
            "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers": False
        }
        return Parallel(world, DistributedDataParallel(entry, **buffers))
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
    return Parallel(world, entry, template)


def is_sharded(t: Tensor) -> "TypeGuard[DTensor]":
    """Whether each process has a part of the tensor alone."""
    return hasattr(t, "full_tensor")  # a DTensor, whose module is not imported where there is none


def local(t: Tensor) -> Tensor:
    """What this process holds of ``t``."""
    return t.to_local() if is_sharded(t) else t


def whole(t: Tensor) -> Tensor:
    """All of ``t``; where it is sharded, all processes call this."""
    return t.full_tensor() if is_sharded(t) else t


def placed_like(model: Tensor, t: Tensor) -> Tensor:
    """``t``, all of which is here, as ``model`` lies: this process's part of it where that is sharded."""
    if not is_sharded(model) or is_sharded(t):
        return t
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t.to(model.device), model.device_mesh, model.placements, src_data_rank=None)
