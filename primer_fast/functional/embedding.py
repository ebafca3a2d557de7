"""Token embedding, with the positions' in the same pass."""

import torch.nn.functional as torch_F
from torch import Tensor


def embedding(
    input: Tensor,  # (...) integers: rows of weight
    weight: Tensor,  # (V, D)
    padding_idx: int | None = None,
    *,
    position: Tensor | None = None,  # (P, D): a row for each position
    position_ids: Tensor | None = None,  # integers that broadcast to input's shape; None: 0, 1, ... along its last axis
) -> Tensor:  # (..., D)
    """``weight[input] + position[position_ids]``."""
    return embedding_plain(input, weight, padding_idx, position=position, position_ids=position_ids)


def embedding_plain(input, weight, padding_idx=None, *, position=None, position_ids=None):
    """The same through torch's own operators."""
    y = torch_F.embedding(input, weight, padding_idx)
    if position is None:
        return y
    if position_ids is None:
        return y + position[: input.shape[-1]]
    return y + torch_F.embedding(position_ids, position)
