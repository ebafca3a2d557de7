"""Normalisation layers."""

__all__ = ["LayerNorm"]

from typing import Literal, overload

import torch
import torch.nn.functional as torch_F
from torch import Tensor
from torch.jit import is_scripting

from primer_fast import functional as F
from primer_fast.nn.graphs import is_leaf, node_of


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
    ):  # as input; with return_residual also input + residual
        if is_scripting():
            if return_residual:
                raise ValueError("LayerNorm: return_residual must be False in TorchScript; got True")
            total = input if residual is None else input + residual
            return torch_F.layer_norm(total, self.normalized_shape, self.weight, self.bias, self.eps)
        else:
            if is_leaf(self, input):
                return node_of(self, input, residual, return_residual)
            return F.layer_norm(
                input, self.normalized_shape, self.weight, self.bias, self.eps,
                residual=residual, return_residual=return_residual,
            )  # fmt: skip
