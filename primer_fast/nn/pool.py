"""Pooling layers."""

__all__ = ["MaxPool2d"]

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as torch_F
from torch import Tensor
from torch.jit import is_scripting

from primer_fast import functional as F
from primer_fast.nn.graphs import is_leaf, node_of


class MaxPool2d(torch.nn.MaxPool2d):
    """``torch.nn.MaxPool2d``: the largest element of each window; no parameters."""

    if TYPE_CHECKING:
        return_indices: Any  # torch's types want a literal; a comment for the checker alone ends TorchScript's parser

    def forward(self, input: Tensor):  # (N, C, H, W) -> (N, C, OH, OW), with return_indices twice
        if is_scripting():
            return torch_F.max_pool2d(
                input, self.kernel_size, self.stride, self.padding, self.dilation,
                ceil_mode=self.ceil_mode, return_indices=self.return_indices,
            )  # fmt: skip
        else:
            if is_leaf(self, input):
                return node_of(self, input)
            return F.max_pool2d(
                input, self.kernel_size, self.stride, self.padding, self.dilation,
                ceil_mode=self.ceil_mode, return_indices=self.return_indices,
            )  # fmt: skip
