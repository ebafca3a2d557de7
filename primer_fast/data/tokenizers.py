"""Text as integers and back: bytes, characters, or a file of Hugging Face's ``tokenizers``; each has a JSON form.

Bytes are ``{"primer_fast": "bytes"}``, characters are ``{"primer_fast": "characters", "characters": ...}``; any other
JSON object is taken for a file of the ``tokenizers`` package.
"""

__all__ = [
    "KIND",
    "STOP_TOKENS",
    "ByteTokenizer",
    "CharacterTokenizer",
    "HuggingFaceTokenizer",
    "Tokenizer",
    "check_fits",
    "check_whole",
    "from_json",
    "line_end",
    "load",
    "make",
    "without_token",
]

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

KIND = "primer_fast"
STOP_TOKENS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>", "[SEP]")


class Tokenizer(Protocol):
    """What turns text into ids and back."""

    name: str  # "bytes", "characters", "tokenizers"
    unit: str  # what one token is called: "byte", "character", "token"
    vocab_size: int  # ids are 0 .. vocab_size - 1
    stop_tokens: tuple[int, ...]  # ids after which a text is over

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def token_ids(self) -> Iterable[int]:
        """The ids that stand for a token, in any order."""
        ...

    def to_json(self) -> str: ...


class ByteTokenizer:
    """UTF-8: every text can be encoded. Bytes that form no character, as where one is cut, are decoded as U+FFFD.

    Raises:
        ValueError: from ``encode``, half a character, as Python makes of what is not UTF-8 on a command line.
    """

    name, unit, vocab_size = "bytes", "byte", 256
    stop_tokens: tuple[int, ...] = ()

    def encode(self, text: str) -> list[int]:
        check_whole(text)
        return list(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(_inside(ids, 256)).decode(errors="replace")

    def token_ids(self) -> Iterable[int]:
        return range(self.vocab_size)

    def to_json(self) -> str:
        return json.dumps({KIND: self.name})


class CharacterTokenizer:
    """The characters of ``alphabet``, each once, in the order of their code points.

    Raises:
        ValueError: an alphabet without characters, or with half of one; from ``encode``, characters outside it, which
            it names.
    """

    name, unit = "characters", "character"
    stop_tokens: tuple[int, ...] = ()

    def __init__(self, alphabet: str):
        if not alphabet:
            raise ValueError("CharacterTokenizer: alphabet must hold at least one character; got ''")
        check_whole(alphabet)
        self.characters = sorted(set(alphabet))
        self.ids = {character: i for i, character in enumerate(self.characters)}
        self.vocab_size = len(self.characters)

    def encode(self, text: str) -> list[int]:
        try:
            return [self.ids[character] for character in text]
        except KeyError:
            unknown = sorted(set(text) - self.ids.keys())
            names = ", ".join(map(repr, unknown[:10])) + (f" and {len(unknown) - 10} more" if len(unknown) > 10 else "")
            raise ValueError(
                f"CharacterTokenizer: the text must be made of the {self.vocab_size} characters of the training text; "
                f"got {names}"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.characters[i] for i in _inside(ids, self.vocab_size))

    def token_ids(self) -> Iterable[int]:
        return range(self.vocab_size)

    def to_json(self) -> str:
        return json.dumps({KIND: self.name, "characters": "".join(self.characters)}, ensure_ascii=False)


class HuggingFaceTokenizer:
    """A tokenizer of the ``tokenizers`` package from its JSON; it adds no special tokens, and decodes them as written.

    A file may also say that texts are cut or padded to a length, and that words are cut at random (BPE's dropout). All
    of this is switched off, and is not in ``to_json``: every text is encoded whole, and always as the same tokens.

    ``stop_tokens`` are those of its special tokens that are known to end a text, as ``<|endoftext|>`` and ``</s>``.

    Raises:
        ModuleNotFoundError: the package is not installed.
        ValueError: not a tokenizer of that package; from ``encode`` and ``decode``, whatever it refuses.
    """

    name, unit = "tokenizers", "token"

    def __init__(self, content: str):
        try:
            import tokenizers
        except ModuleNotFoundError as error:
            message = "this tokenizer needs the package tokenizers: pip install 'primer-fast[cli]'"
            raise ModuleNotFoundError(message, name=error.name) from error
        with _refused("not a file of the tokenizers package"):
            self.tokenizer = tokenizers.Tokenizer.from_str(content)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        if getattr(self.tokenizer.model, "dropout", None) is not None:
            self.tokenizer.model.dropout = None
        self.vocab_size = 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if self.vocab_size == 0:
            raise ValueError("a tokenizer without tokens")
        special = self.tokenizer.get_added_tokens_decoder()
        self.stop_tokens = tuple(i for i, token in special.items() if token.content in STOP_TOKENS)

    def encode(self, text: str) -> list[int]:
        check_whole(text)
        with _refused("the tokenizer cannot encode the text"):
            return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        ids = _inside(ids, self.vocab_size)
        with _refused("the tokenizer cannot decode the tokens"):
            return self.tokenizer.decode(ids, skip_special_tokens=False)

    def token_ids(self) -> Iterable[int]:
        return self.tokenizer.get_vocab(with_added_tokens=True).values()

    def to_json(self) -> str:
        return self.tokenizer.to_str()


@contextlib.contextmanager
def _refused(what: str) -> Iterator[None]:
    """Whatever the package raises becomes a ValueError. It raises Exception itself, and panics, which are none."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise ValueError(f"{what} ({' '.join(str(error).split())})") from error


def check_whole(text: str) -> None:
    """Raise ValueError where a text has half a character: a surrogate, which no UTF-8 holds."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise ValueError(f"the text must hold whole characters; got {half!r} alone at place {error.start}") from None


def line_end(tokenizer: Tokenizer) -> int | None:
    """The token that a line ends with; None where there is none, as in a tokenizer that passes white space over."""
    try:
        last = tokenizer.encode("\n")[-1:]
    except ValueError:
        return None
    return last[0] if last and "\n" in tokenizer.decode(last) else None


def check_fits(tokenizer: Tokenizer, vocab: int) -> None:
    """Raise ValueError where a tokenizer has ids beyond a model's; a caller says before it whose tokenizer that is."""
    if tokenizer.vocab_size > vocab:
        raise ValueError(f"must have at most the model's {vocab} tokens; got {tokenizer.vocab_size}")


def without_token(tokenizer: Tokenizer, vocab: int) -> Tensor:  # (N,) int64
    """The ids below ``vocab`` that stand for no token: gaps in a tokenizer, and rows by which a model is padded.

    Errors as ``check_fits``.
    """
    check_fits(tokenizer, vocab)
    lacks = torch.ones(vocab, dtype=torch.bool)
    lacks[torch.tensor(list(tokenizer.token_ids()), dtype=torch.int64)] = False
    return lacks.nonzero()[:, 0]


def from_json(content: str) -> Tokenizer:
    """The tokenizer that ``to_json`` of any of the classes wrote, or the content of a ``tokenizers`` file.

    Raises:
        ValueError: not JSON, or nothing that is known.
        ModuleNotFoundError: a ``tokenizers`` file without that package.
    """
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"a tokenizer is a JSON object; got {type(values).__name__}")
    if KIND not in values:
        return HuggingFaceTokenizer(content)
    if values[KIND] == "bytes":
        return ByteTokenizer()
    if values[KIND] == "characters" and isinstance(values.get("characters"), str):
        return CharacterTokenizer(values["characters"])
    raise ValueError(f"not a tokenizer of this version: {KIND} is {values[KIND]!r}")


def load(path: str | Path) -> Tokenizer:
    """The tokenizer of a JSON file.

    Raises:
        ValueError: there is no such file, or it holds no tokenizer; names the file.
    """
    path = Path(path)
    try:
        return from_json(path.read_bytes().decode())
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file, so there is no tokenizer to read") from error
    except IsADirectoryError as error:
        raise ValueError(f"{path}: a folder; a tokenizer is a JSON file") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def make(name: str, text: str) -> Tokenizer:
    """The tokenizer for a ``text``: "bytes", "characters" (those of the text), or a JSON file by its path.

    Raises:
        ValueError: none of these, or a file that holds no tokenizer.
    """
    if name == "bytes":
        return ByteTokenizer()
    if name == "characters":
        return CharacterTokenizer(text)
    if not name.lower().endswith(".json"):
        raise ValueError(f"the tokenizer must be bytes, characters or a .json file; got {name!r}")
    return load(name)


def _inside(ids: Iterable[int], vocab_size: int) -> list[int]:
    ids = [int(i) for i in ids]
    wrong = [i for i in ids if not 0 <= i < vocab_size]
    if wrong:
        raise ValueError(f"decode: tokens must be 0 to {vocab_size - 1}; got {wrong[0]}")
    return ids
