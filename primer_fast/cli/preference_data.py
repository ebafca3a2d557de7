"""The preferences of a ``--data`` argument, as pairs of tokens to train on and to measure by."""

from pathlib import Path

import torch
from torch import Tensor

from primer_fast.cli.options.pairs import PairOptions
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
