"""Log-probabilities of completions under a language model: what supervised fine-tuning, DPO and PPO stand on."""

import torch
from torch import Tensor

from primer_fast.data.completions import Completions


def token_log_probs(
    model: torch.nn.Module,  # a causal Transformer
    batch: Completions,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # (N, T - 1) float32, with return_entropy twice
    """log p(tokens[:, t + 1] | tokens[:, : t + 1]) at every completion token, 0 elsewhere; and the entropy there.

    Only rows of completion tokens meet the vocabulary, and their logits are never in memory. What pads a row changes
    nothing: a causal model sees no token behind the one that it predicts from.
    """
    return spread_log_probs(
        model, model.hidden(batch.tokens[:, :-1]), batch, temperature=temperature, return_entropy=return_entropy
    )


def spread_log_probs(
    model: torch.nn.Module,
    hidden: Tensor,  # (N, T - 1, W): model.hidden(batch.tokens[:, :-1])
    batch: Completions,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``token_log_probs`` where the hidden states are known already."""
    index = batch.mask().flatten().nonzero().squeeze(1)
    rows = hidden.flatten(0, 1).index_select(0, index)
    targets = batch.tokens[:, 1:].flatten().index_select(0, index)
    found = model.log_prob_of(rows, targets, temperature=temperature, return_entropy=return_entropy)
    spread = [
        x.new_zeros(hidden.shape[0] * hidden.shape[1]).index_put((index,), x).view(hidden.shape[:2])
        for x in (found if return_entropy else (found,))
    ]
    return tuple(spread) if return_entropy else spread[0]
