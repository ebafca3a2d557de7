"""Linear layer with a fused activation."""

__all__ = ["Linear"]

import torch
from torch import Tensor

from primer_fast import functional as F
from primer_fast.functional.activation import check_activation


class Linear(torch.nn.Linear):
    """``torch.nn.Linear`` followed by ``activation`` in one kernel; same parameters, same state dict.

    Args:
        activation: None, "relu", "leaky_relu", "gelu", "gelu_tanh", "silu", "sigmoid" or "tanh".

    Raises:
        ValueError: ``activation`` is none of these.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        activation: str | None = None,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation = check_activation("Linear", activation)

    def forward(self, input: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        return self.activated(input, self.activation)

    def activated(self, input: Tensor, activation: str | None) -> Tensor:
        """``forward`` with another activation."""
        return F.linear(input, self.weight, self.bias, activation=activation)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"
