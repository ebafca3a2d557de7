"""Layer normalisation, with the residual sum in the same pass."""

from collections.abc import Sequence

import torch.nn.functional as torch_F
from torch import Tensor


def layer_norm(
    input: Tensor,  # (..., *normalized_shape)
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,  # normalized_shape
    bias: Tensor | None = None,  # normalized_shape
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,  # as input
    return_residual: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # as input; with return_residual also input + residual
    """``LayerNorm(input + residual)``; the sum is the second output where ``return_residual`` asks for it."""
    return layer_norm_plain(
        input, normalized_shape, weight, bias, eps, residual=residual, return_residual=return_residual
    )


def layer_norm_plain(
    input, normalized_shape, weight=None, bias=None, eps=1e-5, *, residual=None, return_residual=False
):
    """The same through torch's own operators."""
    total = input if residual is None else input + residual
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    y = torch_F.layer_norm(total, shape, weight, bias, eps)
    return (y, total) if return_residual else y
