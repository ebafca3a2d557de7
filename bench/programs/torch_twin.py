"""The same model from torch.nn, with copies of the weights of ours: what plain PyTorch is compared by."""

from collections.abc import Iterable

import torch

from primer_fast.functional.activation import ACTIVATIONS
from primer_fast.models.cnn import CNN
from primer_fast.models.mlp import MLP


def torch_twin(model: MLP | CNN) -> torch.nn.Sequential:
    """``model`` as modules of torch.nn, with copies of its weights in the same memory format.

    The twin of a CNN of one channel takes (B, H, W), that of another (B, C, H, W).
    """
    if isinstance(model, MLP):
        modules = [torch.nn.Flatten(), *_twins(model.layers)]
    else:
        channels, height, _ = model.config.image
        modules = [torch.nn.Unflatten(1, (1, height))] if channels == 1 else []
        for convolution in model.convolutions:
            modules += [*_twins([convolution]), torch.nn.MaxPool2d(model.config.pool)]
        modules += torch_twin(model.mlp)
    return torch.nn.Sequential(*modules).to(next(model.parameters()).device)


def _twins(layers: Iterable[torch.nn.Module]) -> list[torch.nn.Module]:
    """torch.nn.Linear or torch.nn.Conv2d for each of ``layers``, and a module for its activation if it has one."""
    modules = []
    for layer in layers:
        if isinstance(layer, torch.nn.Conv2d):
            twin = torch.nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size)
            twin.to(memory_format=torch.channels_last)
        else:
            twin = torch.nn.Linear(layer.in_features, layer.out_features)
        twin.load_state_dict(layer.state_dict())
        modules += [twin] if layer.activation is None else [twin, ACTIVATIONS[layer.activation].module()]
    return modules
