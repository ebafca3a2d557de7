"""What `primer-fast align` aligns on: words or sentences that people rated, or preference pairs, as tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from primer_fast.data import preferences, text, tokenizers
from primer_fast.data.completions import CompletionPairs, Completions, encode_completions, encode_pairs
from primer_fast.data.preferences import Preference, RatedText
from primer_fast.data.text import TokenizedText
from primer_fast.data.tokenizers import Tokenizer

END = "\n"  # closes every completion, and stands for the empty prompt
PROMPT_WORDS = 3  # of a sentence; the rest is its completion
TRIGRAM = 3


@dataclass(frozen=True)
class Material:
    """Texts and preferences of one run. A text that is held out is in no pair that a reward or a policy learns from."""

    name: str
    unit: str  # what a completion is: "word", "sentence", "completion"
    tokenizer: Tokenizer
    end: int
    context: int
    running_text: TokenizedText | None  # to pretrain on before the completions
    corpus: Completions  # to pretrain on: spelling alone, no ratings
    train_pairs: CompletionPairs
    test_pairs: CompletionPairs
    prompts: list[Tensor]  # of training
    test_prompts: list[Tensor]
    ratings: dict[str, float]  # what people thought of a completion, where each is a whole text; else empty
    held_out: frozenset[str]  # the texts of these that no preference was learned from
    trigrams: frozenset[str]  # of all texts, with their borders

    @property
    def longest_prompt(self) -> int:
        return max(len(prompt) for prompt in (*self.prompts, *self.test_prompts))

    def decode(self, ids: Sequence[int]) -> str:
        """A completion or prompt as text, without the token that ends it."""
        return self.tokenizer.decode([i for i in ids if i != self.end])

    def is_plausible(self, word: str) -> bool:
        """Whether every three letters in a row of a word, its borders included, occur in a known word."""
        return bool(word) and _trigrams(word) <= self.trigrams


def _trigrams(word: str) -> set[str]:
    bordered = f"^{word}$"
    return {bordered[i : i + TRIGRAM] for i in range(len(bordered) - TRIGRAM + 1)}


def words(rated: Sequence[RatedText], *, pairs: int, minimum_gap: float, held_out: float, seed: int) -> Material:
    """Rated words, each a completion of the empty prompt."""
    train, test = preferences.split_texts(rated, held_out, seed)
    every = [t.text for t in (*train, *test)]
    tokenizer = tokenizers.CharacterTokenizer("".join(every) + END)
    end = tokenizer.encode(END)[0]
    context = max(map(len, every)) + 2
    start = torch.tensor([end])
    train_pairs, test_pairs = (
        encode_pairs(
            preferences.pair_texts(part, count, minimum_gap=minimum_gap, seed=seed),
            tokenizer.encode, end=end, context=context,
        )
        for part, count in ((train, pairs), (test, max(1, pairs // 5)))
    )  # fmt: skip
    return Material(
        "the lexicon's words", "word", tokenizer, end, context, None,
        encode_completions([("", word) for word in every], tokenizer.encode, end=end, context=context),
        train_pairs, test_pairs, [start], [start],
        {t.text: t.rating for t in (*train, *test)}, frozenset(t.text for t in test),
        frozenset().union(*map(_trigrams, every)),
    )  # fmt: skip


def sentences(
    rated: Sequence[RatedText], running_text: str | None, *, tokenizer: str, context: int, pairs: int,
    minimum_gap: float, held_out: float, seed: int,
) -> Material:  # fmt: skip
    """Rated sentences: their first words are prompts, the rest are completions, cut where the context ends.

    Raises:
        ValueError: no sentence has more than ``PROMPT_WORDS`` words, or these fill the context.
    """
    rated = [RatedText(" ".join(t.text.split()), t.rating) for t in rated]
    rated = [t for t in rated if len(t.text.split()) > PROMPT_WORDS]
    if not rated:
        raise ValueError(f"there must be texts of more than {PROMPT_WORDS} words: the first ones are the prompt")
    train, test = preferences.split_texts(rated, held_out, seed)
    pairs_of = [
        preferences.pair_texts(part, count, minimum_gap=minimum_gap, seed=seed)
        for part, count in ((train, pairs), (test, max(1, pairs // 5)))
    ]
    return _prompted(
        "rated sentences", "sentence", [_cut(t.text) for t in train], [_cut(t.text) for t in test],
        [[(_cut(p.chosen), _cut(p.rejected), p.margin) for p in part] for part in pairs_of],
        running_text, tokenizer, context,
    )  # fmt: skip


def pairs(
    given: Sequence[Preference], running_text: str | None, *, tokenizer: str, context: int, held_out: float, seed: int
) -> Material:
    """Preference pairs of a file; some are held out, so that no completion is on both sides."""
    train, test = preferences.split_pairs(given, held_out, seed)
    sides = [[((p.prompt, p.chosen), (p.prompt, p.rejected), p.margin) for p in part] for part in (train, test)]
    of_train, of_test = (list(dict.fromkeys(side for pair in part for side in pair[:2])) for part in sides)
    return _prompted("preference pairs", "completion", of_train, of_test, sides, running_text, tokenizer, context)


def _cut(sentence: str) -> tuple[str, str]:
    """Split a sentence into a prompt, its first words, and a completion, the rest with the space before it."""
    prompt = " ".join(sentence.split(" ")[:PROMPT_WORDS])
    return prompt, sentence[len(prompt) :]


def _prompts(texts: Sequence[str], tokenizer: Tokenizer, end: int, context: int) -> list[Tensor]:
    """The tokens of each different prompt; long ones, of over a third of the context, only where all are long."""
    prompts = [torch.tensor(tokenizer.encode(text) or [end]) for text in dict.fromkeys(texts)]
    return [p for p in prompts if 3 * len(p) <= context] or prompts


def _prompted(name, unit, train, test, pair_texts, running_text, tokenizer_name, context) -> Material:
    """The material of texts, each a (prompt, completion), and of pairs (chosen, rejected, margin) of such texts."""
    tokenizer = tokenizers.make(tokenizer_name, "".join(p + c for p, c in (*train, *test)) + (running_text or "") + END)
    end = tokenizers.line_end(tokenizer)
    if end is None:
        raise ValueError("--tokenizer must have a token for the end of a line, which ends a completion")

    def fit(prompt: str, completion: str) -> tuple[list[int], list[int]]:
        """The tokens of both; the completion ends with the end token, unless the context is full before."""
        before = tokenizer.encode(prompt) or [end]
        if len(before) >= context:
            raise ValueError(f"a prompt must leave room in the context of {context} tokens; got {prompt!r}")
        return before, [*tokenizer.encode(completion), end][: context - len(before)]

    def encode(texts):
        return encode_completions([fit(*t) for t in texts], list, end=None, context=context)

    train_pairs, test_pairs = (
        CompletionPairs(
            encode([chosen for chosen, _, _ in part]), encode([rejected for _, rejected, _ in part]),
            torch.tensor([margin for *_, margin in part], dtype=torch.float32),
        )
        for part in pair_texts
    )  # fmt: skip
    prompts, test_prompts = (
        _prompts([prompt for prompt, _ in part], tokenizer, end, context) for part in (train, test)
    )
    tokens = text.tokenize(running_text, tokenizer, context) if running_text else None
    return Material(
        name, unit, tokenizer, end, context, tokens, encode(train), train_pairs, test_pairs, prompts, test_prompts,
        {}, frozenset(), frozenset(),
    )  # fmt: skip
