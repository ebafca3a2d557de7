"""Log-probabilities of completions under a language model: what supervised fine-tuning, DPO and PPO stand on."""

__all__ = ["spread_log_probs", "token_log_probs"]

from typing import Literal, overload

from torch import Tensor

from primer_fast.data.completions import Completions
from primer_fast.models.transformer import Transformer


@overload
def token_log_probs(
    model: Transformer, batch: Completions, places: Tensor | None = None, *,
    temperature: float = 1.0, return_entropy: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def token_log_probs(
    model: Transformer, batch: Completions, places: Tensor | None = None, *,
    temperature: float = 1.0, return_entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def token_log_probs(
    model: Transformer, batch: Completions, places: Tensor | None = None, *,
    temperature: float = 1.0, return_entropy: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def token_log_probs(
    model: Transformer,  # causal
    batch: Completions,
    places: Tensor | None = None,  # (M,) int64: of the completion tokens in (N, T - 1) that is flat; -1 is no place
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # (N, T - 1) float32, with return_entropy twice
    """log p(tokens[:, t + 1] | tokens[:, : t + 1]) at every completion token, 0 elsewhere; and the entropy there.

    Only rows of completion tokens meet the vocabulary, and their logits are never in memory. What pads a row changes
    nothing: a causal model sees no token behind the one that it predicts from. Without ``places`` the host asks the
    device where these tokens are, and waits for the answer.
    """
    return spread_log_probs(
        model, model.hidden(batch.tokens[:, :-1]), batch, places,
        temperature=temperature, return_entropy=return_entropy,
    )  # fmt: skip


@overload
def spread_log_probs(
    model: Transformer, hidden: Tensor, batch: Completions, places: Tensor | None = None, *,
    temperature: float = 1.0, return_entropy: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def spread_log_probs(
    model: Transformer, hidden: Tensor, batch: Completions, places: Tensor | None = None, *,
    temperature: float = 1.0, return_entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def spread_log_probs(
    model: Transformer, hidden: Tensor, batch: Completions, places: Tensor | None = None, *,
    temperature: float = 1.0, return_entropy: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def spread_log_probs(
    model: Transformer,
    hidden: Tensor,  # (N, T - 1, W): model.hidden(batch.tokens[:, :-1])
    batch: Completions,
    places: Tensor | None = None,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``token_log_probs`` where the hidden states are known already."""
    if places is None:
        places = batch.mask().flatten().nonzero().squeeze(1)
    some = places.clamp(min=0)  # what is no place has the first row, whose result is dropped
    rows, targets = hidden.flatten(0, 1).index_select(0, some), batch.tokens[:, 1:].flatten().index_select(0, some)
    found = model.log_prob_of(rows, targets, temperature=temperature, return_entropy=return_entropy)
    shape = hidden.shape[:2]

    def spread(x: Tensor) -> Tensor:
        return x.new_zeros(shape.numel() + 1).index_put((places,), x)[:-1].view(shape)  # -1 is the last

    return (spread(found[0]), spread(found[1])) if isinstance(found, tuple) else spread(found)
