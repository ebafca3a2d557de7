"""Completions as a training step takes them: of sizes that recur, and with the places of the tokens that count.

The host knows the lengths beforehand, so a step need not ask the device for them; and a CUDA graph is of fixed sizes.
Legend: N completions, T tokens; S micro-batches, M tokens of the completions in one of them.
"""

__all__ = ["rounded", "to_device"]

from collections.abc import Iterable

import torch
import torch.nn.functional as torch_F
from torch import Tensor

from primer_fast.data.completions import Completions
from primer_fast.train import cuda_graphs
from primer_fast.train.common import sent
from primer_fast.train.world import Share


def rounded(size: int) -> int:
    """``size`` up to a number of four binary digits and zeros: at most an eighth more, and few different ones."""
    step = 1 << max(0, size.bit_length() - 4)
    return -(-size // step) * step


def to_device(
    batch: Completions,  # on the CPU
    shares: Iterable[Share],
    device: torch.device,
    longest: int,  # that T may become
    *,
    sides: int = 1,  # 2: the rows are pairs, all the chosen ones first, and a micro-batch has both rows of its pairs
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # (N, T), (N,), (N,), (S, M): tokens, their lengths, ``token_log_probs``'s
    """The batch and the ``places`` of each micro-batch. On a GPU T and M are rounded up, so that steps can be recorded.

    The step is not waited for: nothing here reads from the device.
    """
    recurring = rounded if device.type == cuda_graphs.CudaGraphs.device_type else int
    width = max(batch.tokens.shape[1], min(recurring(batch.tokens.shape[1]), longest))
    tokens = torch_F.pad(batch.tokens, (0, width - batch.tokens.shape[1]))
    batch = Completions(tokens, batch.prompt_lengths, batch.lengths)
    mask = batch.mask().unflatten(0, (sides, -1))
    found = [mask[:, share.rows].flatten().nonzero().squeeze(1) for share in shares]
    places = torch.full((len(found), recurring(max(map(len, found)))), -1)
    for row, some in zip(places, found, strict=True):
        row[: len(some)] = some
    tokens, prompt_lengths, lengths, places = (
        sent(x, device) for x in (tokens, batch.prompt_lengths, batch.lengths, places)
    )
    return tokens, prompt_lengths, lengths, places
