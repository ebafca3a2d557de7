"""Linear layer with a fused activation."""

__all__ = ["Linear"]

import torch
import torch.nn.functional as torch_F
from torch import Tensor
from torch.jit import is_scripting

from primer_fast import functional as F
from primer_fast.functional.activation import check_activation
from primer_fast.kernels.activation import activate_plain
from primer_fast.nn.graphs import is_leaf, node_of


class Linear(torch.nn.Linear):
    """``torch.nn.Linear`` followed by ``activation`` in one kernel; same parameters, same state dict.

    Args:
        activation: None or one of ``primer_fast.functional.activation.ACTIVATIONS``.

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
        if is_scripting():
            return activate_plain(torch_F.linear(input, self.weight, self.bias), self.activation)
        else:
            if is_leaf(self, input):
                return node_of(self, input)
            return self.activated(input, self.activation)

    def activated(self, input: Tensor, activation: str | None) -> Tensor:
        """``forward`` with another activation."""
        return F.linear(input, self.weight, self.bias, activation=activation)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"
