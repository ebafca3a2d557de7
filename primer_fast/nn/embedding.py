"""Embedding with the positions' in the same kernel."""

import torch
from torch import Tensor

from primer_fast import functional as F


class Embedding(torch.nn.Embedding):
    """``torch.nn.Embedding``, plus rows of ``position`` in one kernel; same parameters, same state dict."""

    def forward(
        self, input: Tensor, position: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:  # (...) integers -> (..., D)
        return F.embedding(input, self.weight, self.padding_idx, position=position, position_ids=position_ids)
