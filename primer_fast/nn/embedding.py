"""Token embedding, with the positions' in the same pass."""

__all__ = ["Embedding"]

import torch
import torch.nn.functional as torch_F
from torch import Tensor
from torch.jit import is_scripting

from primer_fast import functional as F
from primer_fast.nn.graphs import is_leaf, node_of


class Embedding(torch.nn.Embedding):
    """``torch.nn.Embedding``, plus rows of a position table in the same pass; same parameter, same state dict.

    Raises:
        NotImplementedError: ``max_norm``, ``scale_grad_by_freq`` or ``sparse`` is set; torch.nn.Embedding has them.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device=None,
        dtype=None,
    ):
        unbuilt = {"max_norm": max_norm, "scale_grad_by_freq": scale_grad_by_freq, "sparse": sparse}
        for name, value in unbuilt.items():
            if value or (name == "max_norm" and value is not None):
                raise NotImplementedError(f"Embedding: {name}={value!r} is not built; use torch.nn.Embedding")
        super().__init__(
            num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, _weight,
            _freeze, device, dtype,
        )  # fmt: skip

    def forward(
        self,
        input: Tensor,  # (...) integers
        position: Tensor | None = None,  # (P, embedding_dim)
        position_ids: Tensor | None = None,  # integers that broadcast to input; None: 0, 1, ... on its last axis
    ) -> Tensor:  # (..., embedding_dim)
        if is_scripting():
            y = torch_F.embedding(input, self.weight, self.padding_idx)
            if position is not None:
                rows = position[: input.shape[-1]]
                y = y + (rows if position_ids is None else torch_F.embedding(position_ids, position))
            return y
        else:
            if is_leaf(self, input):
                return node_of(self, input, position, position_ids)
            return F.embedding(input, self.weight, self.padding_idx, position=position, position_ids=position_ids)
