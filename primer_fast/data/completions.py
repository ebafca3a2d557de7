"""Prompts with their completions as tokens: what log-probabilities and rewards are computed on.

Rows are right-padded and carry their lengths, so that no value of the padding means anything: it may be any token, the
end token included, which counts as a token of the completion where it ends one.
"""

__all__ = ["CompletionPairs", "Completions", "Text", "encode_completions", "encode_pairs", "stack"]

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from primer_fast.data.preferences import Preference

Text = TypeVar("Text")


@dataclass(frozen=True)
class Completions:
    """Prompts and completions as one tensor of tokens, padded on the right."""

    tokens: Tensor  # (N, T) int64: a prompt, its completion, padding
    prompt_lengths: Tensor  # (N,) int64, at least 1
    lengths: Tensor  # (N,) int64: prompt and completion together

    def __post_init__(self):
        if self.tokens.dim() != 2 or not self.prompt_lengths.shape == self.lengths.shape == self.tokens.shape[:1]:
            shapes = ", ".join(str(tuple(t.shape)) for t in (self.tokens, self.prompt_lengths, self.lengths))
            raise ValueError(f"Completions: must be tokens (N, T) and two lengths (N,); got {shapes}")

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Tensor | slice) -> "Completions":
        """Some of the rows, cut to the longest of them."""
        lengths = self.lengths[rows]
        longest = int(lengths.max()) if lengths.numel() else 0
        return Completions(self.tokens[rows, :longest], self.prompt_lengths[rows], lengths)

    def to(self, device: torch.device | str) -> "Completions":
        return Completions(*(t.to(device) for t in (self.tokens, self.prompt_lengths, self.lengths)))

    def mask(self) -> Tensor:
        """(N, T - 1) bool: position t is true where the token after it, tokens[:, t + 1], belongs to the completion."""
        following = torch.arange(1, self.tokens.shape[1], device=self.tokens.device)
        return (following >= self.prompt_lengths[:, None]) & (following < self.lengths[:, None])


def encode_completions(
    texts: Sequence[tuple[Text, Text]],  # (prompt, completion)
    encode: Callable[[Text], Sequence[int]],
    *,
    end: int | None,  # closes every completion; also what an empty prompt is encoded as
    context: int,
) -> Completions:
    """Each prompt and completion encoded by itself, one after the other, then ``end``.

    Raises:
        ValueError: a completion is empty, or a prompt and completion exceed ``context``; says which and by how much.
    """
    rows, prompt_lengths = [], []
    for number, (prompt, completion) in enumerate(texts):
        before, after = list(encode(prompt)), list(encode(completion))
        if not after:
            raise ValueError(f"completion {number} must not be empty; got {completion!r} after the prompt {prompt!r}")
        if not before:
            if end is None:
                raise ValueError(f"prompt {number} must not be empty where there is no end token to stand for it")
            before = [end]
        row = before + after + ([] if end is None else [end])
        if len(row) > context:
            what = "prompt" if len(before) >= context else "prompt and completion"
            raise ValueError(
                f"{what} {number} must fit the context of {context} tokens; got {len(row)}, {len(before)} of the prompt"
            )
        rows.append(torch.tensor(row, dtype=torch.int64))
        prompt_lengths.append(len(before))
    if not rows:
        raise ValueError("there must be at least one completion; got none")
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return Completions(tokens, torch.tensor(prompt_lengths), torch.tensor([len(row) for row in rows]))


def stack(first: Completions, second: Completions) -> Completions:
    """Rows of both one after the other, padded to the longer: what one forward takes for pairs."""
    longest = max(first.tokens.shape[1], second.tokens.shape[1])
    tokens = [torch.nn.functional.pad(c.tokens, (0, longest - c.tokens.shape[1])) for c in (first, second)]
    lengths = (torch.cat([first.prompt_lengths, second.prompt_lengths]), torch.cat([first.lengths, second.lengths]))
    return Completions(torch.cat(tokens), *lengths)


@dataclass(frozen=True)
class CompletionPairs:
    """Preference pairs as tokens: row i of ``chosen`` was preferred to row i of ``rejected``."""

    chosen: Completions
    rejected: Completions
    margin: Tensor  # (N,) float32, 0 where it is not known

    def __post_init__(self):
        if not len(self.chosen) == len(self.rejected) == len(self.margin):
            got = f"{len(self.chosen)}, {len(self.rejected)} and {len(self.margin)}"
            raise ValueError(f"CompletionPairs: chosen, rejected and margin must be one a pair; got {got}")

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, rows: Tensor | slice) -> "CompletionPairs":
        return CompletionPairs(self.chosen[rows], self.rejected[rows], self.margin[rows])

    def stacked(self) -> Completions:
        """(2 N) rows, the chosen ones first: what one forward takes for both."""
        return stack(self.chosen, self.rejected)


def encode_pairs(
    pairs: Sequence[Preference], encode: Callable[[str], Sequence[int]], *, end: int | None, context: int
) -> CompletionPairs:
    """Errors as ``encode_completions``."""
    chosen, rejected = (
        encode_completions([(p.prompt, getattr(p, side)) for p in pairs], encode, end=end, context=context)
        for side in ("chosen", "rejected")
    )
    return CompletionPairs(chosen, rejected, torch.tensor([p.margin for p in pairs], dtype=torch.float32))
