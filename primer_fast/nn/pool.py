"""Pooling layers."""

__all__ = ["MaxPool2d"]

import torch
from torch import Tensor

from primer_fast import functional as F


class MaxPool2d(torch.nn.MaxPool2d):
    """``torch.nn.MaxPool2d``: the largest element of each window; no parameters."""

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:  # (N, C, H, W) -> (N, C, OH, OW)
        return F.max_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            ceil_mode=self.ceil_mode,
            return_indices=self.return_indices,
        )
