"""Normalisation layers."""

__all__ = ["LayerNorm"]

from typing import Literal, overload

import torch
from torch import Tensor

from primer_fast import functional as F


class LayerNorm(torch.nn.LayerNorm):
    """``torch.nn.LayerNorm`` of ``input + residual``, in one pass; same parameters, same state dict."""

    @overload
    def forward(
        self, input: Tensor, residual: Tensor | None = None, return_residual: Literal[False] = False
    ) -> Tensor: ...
    @overload
    def forward(
        self, input: Tensor, residual: Tensor | None = None, *, return_residual: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(
        self, input: Tensor, residual: Tensor | None = None, return_residual: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]: ...
    def forward(
        self,
        input: Tensor,  # (..., *normalized_shape)
        residual: Tensor | None = None,  # as input
        return_residual: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:  # as input; with return_residual also input + residual
        return F.layer_norm(
            input,
            self.normalized_shape,
            self.weight,
            self.bias,
            self.eps,
            residual=residual,
            return_residual=return_residual,
        )
