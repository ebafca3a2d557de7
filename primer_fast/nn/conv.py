"""Convolution with a fused activation."""

__all__ = ["Conv2d"]

from typing import Literal

import torch
import torch.nn.functional as torch_F
from torch import Tensor
from torch.jit import is_scripting

from primer_fast import functional as F
from primer_fast.functional.activation import check_activation
from primer_fast.kernels.activation import activate_plain
from primer_fast.nn.graphs import is_leaf, node_of


class Conv2d(torch.nn.Conv2d):
    """``torch.nn.Conv2d`` followed by ``activation`` in one kernel; same parameters, same state dict.

    ``padding_mode`` other than "zeros" pads a copy of the input first, as torch does.

    Args:
        activation: None or one of ``primer_fast.functional.activation.ACTIVATIONS``.

    Raises:
        ValueError: ``activation`` is none of these.
    """

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device=None,
        dtype=None,
        *,
        activation: str | None = None,
    ):
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self.activation = check_activation("Conv2d", activation)

    def forward(self, input: Tensor) -> Tensor:  # (N, C, H, W) or (C, H, W) -> (N, O, P, Q) or (O, P, Q)
        if is_scripting():
            return activate_plain(self._conv_forward(input, self.weight, self.bias), self.activation)
        else:
            if is_leaf(self, input):
                return node_of(self, input)
            return self.activated(input, self.activation)

    def activated(self, input: Tensor, activation: str | None) -> Tensor:
        """``forward`` with another activation."""
        padding: int | tuple[int, int] | str = self.padding
        if self.padding_mode != "zeros":
            input = torch_F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return F.conv2d(
            input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups, activation=activation
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"
