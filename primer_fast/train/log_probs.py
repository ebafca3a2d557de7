"""Log-probabilities of completions under a language model: what supervised fine-tuning, DPO and PPO stand on.

Only the tokens of completions count. A step is given the *places* of these, since the host knows all lengths before it
sends a batch: asking the device would make it wait. A CUDA graph is of fixed sizes, so on a GPU sizes are rounded up.
Legend: N completions, T tokens, W width of the model; S micro-batches, M completion tokens in one of them.
"""

__all__ = ["rounded", "to_device", "token_log_probs"]

from collections.abc import Iterable
from typing import Literal, overload

import torch
import torch.nn.functional as torch_F
from torch import Tensor

from primer_fast.data.completions import Completions
from primer_fast.models.transformer import Transformer
from primer_fast.train import cuda_graphs
from primer_fast.train.parallel import MicroBatch
from primer_fast.train.steps import sent


def rounded(size: int) -> int:
    """``size`` rounded up to four significant binary digits: at most an eighth more, so that few sizes differ."""
    step = 1 << max(0, size.bit_length() - 4)
    return -(-size // step) * step


def to_device(
    batch: Completions,  # on the CPU
    micro_batches: Iterable[MicroBatch],
    device: torch.device,
    longest: int,  # that T may become
    *,
    sides: int = 1,  # 2: the rows are pairs, all the chosen ones first, and a micro-batch has both rows of its pairs
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # (N, T), (N,), (N,), (S, M)
    """The batch as its three tensors, and the ``places`` of each micro-batch. Nothing here waits for the device."""
    recurring = rounded if device.type == cuda_graphs.CudaGraphs.device_type else int
    width = max(batch.tokens.shape[1], min(recurring(batch.tokens.shape[1]), longest))
    tokens = torch_F.pad(batch.tokens, (0, width - batch.tokens.shape[1]))
    batch = Completions(tokens, batch.prompt_lengths, batch.lengths)
    mask = batch.mask().unflatten(0, (sides, -1))
    found = [mask[:, micro.rows].flatten().nonzero().squeeze(1) for micro in micro_batches]
    places = torch.full((len(found), recurring(max(map(len, found)))), -1)
    for row, some in zip(places, found, strict=True):
        row[: len(some)] = some
    return (
        sent(tokens, device), sent(batch.prompt_lengths, device), sent(batch.lengths, device), sent(places, device)
    )  # fmt: skip


@overload
def token_log_probs(
    model: Transformer, batch: Completions, places: Tensor | None = None, *,
    hidden: Tensor | None = None, temperature: float = 1.0, return_entropy: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def token_log_probs(
    model: Transformer, batch: Completions, places: Tensor | None = None, *,
    hidden: Tensor | None = None, temperature: float = 1.0, return_entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def token_log_probs(
    model: Transformer,  # causal
    batch: Completions,
    places: Tensor | None = None,  # (M,) int64: of the completion tokens in (N, T - 1) that is flat; -1 is no place
    *,
    hidden: Tensor | None = None,  # (N, T - 1, W): model.hidden(batch.tokens[:, :-1]), where it is known already
    temperature: float = 1.0,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # (N, T - 1) float32, with return_entropy twice
    """log p(tokens[:, t + 1] | tokens[:, : t + 1]) at every completion token, 0 elsewhere; and the entropy there.

    Only rows of completion tokens meet the vocabulary, and their logits are never in memory. What pads a row changes
    nothing: a causal model sees no token behind the one that it predicts from. Without ``places`` the host asks the
    device where these tokens are, and waits for the answer.
    """
    if hidden is None:
        hidden = model.hidden(batch.tokens[:, :-1])
    if places is None:
        places = batch.mask().flatten().nonzero().squeeze(1)
    some = places.clamp(min=0)  # what is no place has the first row, whose result is dropped
    rows, targets = hidden.flatten(0, 1).index_select(0, some), batch.tokens[:, 1:].flatten().index_select(0, some)
    found = model.log_prob_of(rows, targets, temperature=temperature, return_entropy=return_entropy)
    shape = hidden.shape[:2]

    def spread(x: Tensor) -> Tensor:
        return x.new_zeros(shape.numel() + 1).index_put((places,), x)[:-1].view(shape)  # -1 is the last

    return (spread(found[0]), spread(found[1])) if isinstance(found, tuple) else spread(found)
