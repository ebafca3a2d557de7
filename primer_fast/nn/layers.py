"""Linear layers that a model calls one after another, as one function where calling them does nothing else."""

__all__ = ["in_turn", "only_forward"]

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from primer_fast import functional as F
from primer_fast.nn.linear import Linear


def only_forward(module: torch.nn.Module) -> bool:
    """Whether a call of the module only runs its class's ``forward``: it has no hooks and no forward of its own.

    Hooks for all modules are not looked at.
    """
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or "forward" in module.__dict__
    )


def in_turn(layers: Iterable[Linear], x: Tensor) -> Tensor:  # (..., n_0) -> (..., n_L)
    """Call each layer on the result of the one before, in one ``F.mlp`` where all are plain and without hooks."""
    layers = list(layers)
    if not _are_one(layers):
        for layer in layers:
            x = layer(x)
        return x
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    return F.mlp(
        x, weights, biases, activation=layers[0].activation if layers[1:] else None,
        output_activation=layers[-1].activation,
    )  # fmt: skip


def _are_one(layers):
    """Whether ``F.mlp`` computes what the layers do: one activation for all hidden ones, and calls that do no more."""
    if len({layer.activation for layer in layers[:-1]}) > 1 or _has_any_global_hook():
        return False
    return all(type(layer) is Linear and only_forward(layer) for layer in layers)
