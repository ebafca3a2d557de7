"""The preferences of a ``--data`` argument, as pairs of tokens to train on and to measure by."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from primer_fast.cli.training import TrainOptions
from primer_fast.data.completions import CompletionPairs, encode_pairs
from primer_fast.data.preferences import (
    Preference,
    RatedText,
    load_lexicon,
    pair_texts,
    read_preferences,
    read_ratings,
    split_pairs,
    split_texts,
)
from primer_fast.data.tokenizers import Tokenizer

LEXICON = "lexicon"


@dataclass(frozen=True, kw_only=True)
class PairOptions(TrainOptions):
    """Options of the commands that train on preferences."""

    data: str  # a JSON Lines file of prompt, chosen, rejected; a TSV of mean_rating, text; or "lexicon": rated words
    model: str  # folder of a finished run of `train gpt` or `train sft`, or a Hugging Face GPT-2 checkpoint's
    held_out: float = 0.1  # share of the texts to measure by at the end; of a JSON Lines file, of the pairs
    pairs: int = 20_000  # that are made of rated texts
    minimum_gap: float = 1.0  # by how much the ratings of a pair differ at least

    def __post_init__(self):
        if not 0 < self.held_out < 1:
            raise ValueError(f"--held-out must be between 0 and 1; got {self.held_out}")


def load_pairs(
    options: PairOptions, tokenizer: Tokenizer, end: int, context: int
) -> tuple[CompletionPairs, CompletionPairs, list[Tensor]]:
    """Pairs to train on, pairs held out, and the prompts of these.

    Raises:
        ValueError, FileNotFoundError: the data cannot be read, or does not fit the model; names the file.
    """
    read = _read(options)
    try:
        train, test = _parts(read, options)
        pairs, held_out = (encode_pairs(part, tokenizer.encode, end=end, context=context) for part in (train, test))
    except ValueError as error:
        raise ValueError(f"{options.data}: {error}") from error
    prompts = [torch.tensor(tokenizer.encode(p) or [end]) for p in dict.fromkeys(p.prompt for p in test)]
    return pairs, held_out, prompts


def _read(options: PairOptions) -> list[Preference] | list[RatedText]:
    if options.data != LEXICON and Path(options.data).suffix.lower() != ".tsv":
        return read_preferences(options.data)
    return load_lexicon() if options.data == LEXICON else read_ratings(options.data)


def _parts(read: list[Preference] | list[RatedText], options: PairOptions) -> tuple[list[Preference], list[Preference]]:
    seed = options.train.seed
    if isinstance(read[0], Preference):
        return split_pairs(read, options.held_out, seed)
    train, test = (
        pair_texts(part, count, minimum_gap=options.minimum_gap, with_margin=True, seed=seed)
        for part, count in zip(
            split_texts(read, options.held_out, seed), (options.pairs, max(1, options.pairs // 5)), strict=True
        )
    )
    return train, test
