"""Layer normalisation with the residual sum in the same kernel."""

import torch
from torch import Tensor

from primer_fast import functional as F


class LayerNorm(torch.nn.LayerNorm):
    """``torch.nn.LayerNorm`` of ``input + residual`` in one kernel; same parameters, same state dict."""

    def forward(
        self, input: Tensor, residual: Tensor | None = None, return_residual: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:  # (..., *normalized_shape); with return_residual also input + residual
        return F.layer_norm(
            input, self.normalized_shape, self.weight, self.bias, self.eps,
            residual=residual, return_residual=return_residual,
        )  # fmt: skip
