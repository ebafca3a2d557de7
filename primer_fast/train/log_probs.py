"""Log-probabilities of completions under a language model: what supervised fine-tuning, DPO and PPO stand on."""

from typing import Literal, overload

from torch import Tensor

from primer_fast.data.completions import Completions
from primer_fast.models.transformer import Transformer


@overload
def token_log_probs(
    model: Transformer, batch: Completions, *, temperature: float = 1.0, return_entropy: Literal[False] = False
) -> Tensor: ...
@overload
def token_log_probs(
    model: Transformer, batch: Completions, *, temperature: float = 1.0, return_entropy: Literal[True]
) -> tuple[Tensor, Tensor]: ...
@overload
def token_log_probs(
    model: Transformer, batch: Completions, *, temperature: float = 1.0, return_entropy: bool
) -> Tensor | tuple[Tensor, Tensor]: ...
def token_log_probs(
    model: Transformer,  # causal
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


@overload
def spread_log_probs(
    model: Transformer, hidden: Tensor, batch: Completions, *,
    temperature: float = 1.0, return_entropy: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def spread_log_probs(
    model: Transformer, hidden: Tensor, batch: Completions, *,
    temperature: float = 1.0, return_entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def spread_log_probs(
    model: Transformer, hidden: Tensor, batch: Completions, *, temperature: float = 1.0, return_entropy: bool
) -> Tensor | tuple[Tensor, Tensor]: ...
def spread_log_probs(
    model: Transformer,
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

    def spread(x: Tensor) -> Tensor:
        return x.new_zeros(hidden.shape[0] * hidden.shape[1]).index_put((index,), x).view(hidden.shape[:2])

    return (spread(found[0]), spread(found[1])) if isinstance(found, tuple) else spread(found)
