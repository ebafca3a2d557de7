"""Multilayer perceptron: linear layers with an activation between them.

    A_0 = X        A_i = act(A_{i-1} W_i^T + b_i)        i = 1..L, W_i (n_i, n_{i-1}), b_i (n_i)

Rows are samples, as everywhere in PyTorch. Books that feed columns print the transpose of this,
A_i = act(W_i A_{i-1} + b_i) with A_i (n_i, B); the weights are the same.
Legend: B batch, n_i width of layer i.
"""

__all__ = ["MLP", "RECTIFIERS", "MLPConfig", "reset_layer"]

from dataclasses import dataclass

import torch
from torch import Tensor

from primer_fast import nn
from primer_fast.functional.activation import ACTIVATIONS, check_activation
from primer_fast.nn.layers import in_turn

RECTIFIERS = tuple(name for name, activation in ACTIVATIONS.items() if activation.rectifies)


@dataclass(frozen=True)
class MLPConfig:
    """Widths and activations of a multilayer perceptron."""

    sizes: tuple[int, ...] = (784, 512, 256, 10)  # n_0 .. n_L: inputs, hidden layers, outputs
    activation: str | None = "relu"  # of the hidden layers
    output_activation: str | None = None  # None: logits, which every loss of primer_fast.train takes

    def __post_init__(self):
        sizes = tuple(self.sizes)
        if len(sizes) < 2 or not all(type(n) is int and n > 0 for n in sizes):
            raise ValueError(f"MLP: sizes must be two or more positive integers; got {list(sizes)}")
        object.__setattr__(self, "sizes", sizes)
        check_activation("MLP", self.activation)
        check_activation("MLP", self.output_activation)


class MLP(nn.Module):
    """The network of ``config``: inputs (B, n_0) or (B, ...) with n_0 elements a sample -> (B, n_L).

    Weights start from a normal distribution of variance gain^2 / fan, biases at zero: He et al. 2015
    (arXiv:1502.01852) for rectifiers, gain^2 = 2 and fan = n_{i-1}; Glorot & Bengio 2010 for the others,
    fan = (n_{i-1} + n_i) / 2 and gain 1, or 4 for the sigmoid, whose slope is at most 1/4.

    Raises:
        ValueError: an input whose samples do not have n_0 elements.
    """

    def __init__(self, config: MLPConfig):
        super().__init__()
        self.config = config
        last = len(config.sizes) - 2
        self.layers = nn.ModuleList(
            nn.Linear(inputs, outputs, activation=config.output_activation if i == last else config.activation)
            for i, (inputs, outputs) in enumerate(zip(config.sizes, config.sizes[1:], strict=False))
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer in self.layers:
            reset_layer(layer)

    def forward(self, x: Tensor) -> Tensor:  # (B, ...) -> (B, n_L)
        inputs = self.config.sizes[0]
        if x.ndim < 2 or x.shape[1:].numel() != inputs:
            raise ValueError(f"MLP: input must be (B, {inputs}) or (B, ...) of as many elements; got {tuple(x.shape)}")
        return in_turn(self.layers, x.flatten(1))


def reset_layer(layer: nn.Linear | nn.Conv2d) -> None:
    """Draw the first weights of ``layer`` as MLP says, by its activation; biases become zero."""
    if layer.activation in RECTIFIERS:
        torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    else:
        torch.nn.init.xavier_normal_(layer.weight, gain=4.0 if layer.activation == "sigmoid" else 1.0)
    if layer.bias is not None:
        torch.nn.init.zeros_(layer.bias)
