"""Keys and values of the tokens a decoder has seen, so that the next token costs one position instead of all.

Rows of a batch may have different lengths: a row's new keys go to its own next position, and attention is told how many
keys each row has. Buffers have their final size from the first token on.
Legend: B batch, T new tokens, S capacity, Hk key heads, d head width.
"""

__all__ = ["KVCache"]

from typing import Any

import torch
from torch import Tensor


class KVCache:
    """What ``Transformer.hidden(tokens, cache=...)`` appends to and attends to; ``Transformer.new_cache`` makes it.

    The first call brings the prompts, padded on the right, with ``lengths`` where they differ; each later one T tokens
    more for every row.

    Args:
        capacity: tokens of the longest row, S.
        fixed: later calls do the same work on the same addresses whatever the lengths are, as a CUDA graph needs;
            otherwise they leave out the positions that no row has reached.

    Raises:
        ValueError: more tokens than ``capacity``.
    """

    def __init__(self, layers: int, batch: int, capacity: int, key_heads: int, head_width: int, *, fixed: bool = False):
        self.shape = (layers, batch, capacity, 2 * key_heads, head_width)
        self.fixed = fixed
        self.store: Tensor | None = None  # (layers, B, S, 2 Hk, d): keys, then values
        self.lengths: Tensor  # (B,) int64; there from the first tokens on, whose device it is on
        self.longest = 0  # an upper bound of lengths that needs no look at the device
        self.uneven = False  # rows may have different lengths

    def place(self, positions: Tensor, T: int) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
        """Of T new tokens: rows of the position table, their numbers, and the keys that attention may see."""
        _, batch, capacity, _, _ = self.shape
        end = self.longest + T
        if end > capacity and not (self.fixed and self.longest):
            raise ValueError(f"KVCache: at most {capacity} tokens fit; got {end}")
        if self.longest == 0:
            self.lengths = torch.zeros(batch, dtype=torch.int64, device=positions.device)
            self._rows = torch.arange(batch, device=positions.device)[:, None]
            self._columns = torch.arange(capacity, device=positions.device)
            return positions, None, {"is_causal": True}
        if not self.uneven and not self.fixed:
            return positions[self.longest : end], None, {} if T == 1 else {"causal_offset": self.longest}
        self._places = self.lengths[:, None] + self._columns[:T]  # (B, T)
        if T > 1:
            return positions, self._places, {"causal_offset": self.lengths}  # hides what is not written yet as well
        if self.fixed or positions.is_cuda:
            return positions, self._places, {"key_lengths": self.lengths + 1}
        seen = self._columns[:end] <= self._places  # once for all layers
        return positions, self._places, {"attn_mask": seen[:, None, None, :]}

    def write(self, layer: int, new: Tensor) -> tuple[Tensor, Tensor]:  # (B, T, 2 Hk, d) -> 2 x (B, keys, Hk, d)
        """Append keys and values of one layer; return all that the layer may look at."""
        if self.store is None:
            self.store = torch.zeros(self.shape, dtype=new.dtype, device=new.device)  # 0 * NaN would be NaN
        memory, end = self.store[layer], self.longest + new.shape[1]
        if self.longest == 0:
            memory[:, :end].copy_(new)
            return _halves(new)
        if self.uneven or self.fixed:
            memory.index_put_((self._rows, self._places), new)
        else:
            memory[:, self.longest : end].copy_(new)
        return _halves(memory if self.fixed else memory[:, :end])

    def advance(self, T: int, lengths: Tensor | None = None) -> None:
        """Count T new tokens for every row, or ``lengths`` (B,) of the first ones."""
        if lengths is None:
            self.lengths.add_(T)
        else:
            if self.longest:
                raise ValueError("KVCache: only the first tokens may be padded; got lengths with later ones")
            self.lengths.copy_(lengths)
            self.uneven = True
        self.longest += T


def _halves(memory: Tensor) -> tuple[Tensor, Tensor]:  # (B, keys, 2 Hk, d) -> keys and values (B, keys, Hk, d)
    keys, values = memory.chunk(2, dim=2)
    return keys, values
