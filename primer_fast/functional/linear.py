"""Differentiable linear layer with bias and activation: checks and reshapes here, math in kernels/linear.py."""

import torch.nn.functional as torch_F
from torch import Tensor

from primer_fast.functional.activation import apply_plain, check_activation


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None) -> Tensor:
    check_activation("linear", activation)
    return linear_plain(input, weight, bias, activation=activation)


def linear_plain(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None) -> Tensor:
    """The same through torch's own operators."""
    return apply_plain(torch_F.linear(input, weight, bias), activation)
