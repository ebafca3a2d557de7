"""Text as one long row of tokens: any UTF-8 file, a folder of them, or the prose that comes with every CPython."""

__all__ = [
    "BUILTIN",
    "HELD_OUT",
    "SUFFIXES",
    "TokenizedText",
    "builtin_text",
    "consecutive_windows",
    "load_text",
    "split",
    "tokenize",
    "windows",
]

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from primer_fast.data.tokenizers import Tokenizer

SUFFIXES = (".md", ".markdown", ".rst", ".text", ".txt")  # of the files that are read of a folder
BUILTIN = "builtin"
HELD_OUT = 0.1  # the last part of a text, to validate on


@dataclass(frozen=True)
class TokenizedText:
    """A text as tokens, the end of it held out."""

    train: Tensor  # (N,) uint16, or int32 for vocabularies beyond that
    validation: Tensor  # (M,)


def load_text(source: str | Path) -> str:
    """The text of ``source``: "builtin", a UTF-8 file, or a folder whose files are joined by an empty line.

    Of a folder the files that end in .md, .markdown, .rst, .text or .txt are read, its own folders' too, in the order
    of their paths. Line ends become "\\n"; a byte order mark is dropped.

    Raises:
        ValueError: no such file or folder, one without such files, an empty file, or one that is not UTF-8.
    """
    if str(source) == BUILTIN:
        return builtin_text()
    source = Path(source)
    if source.is_dir():
        files = sorted(p for p in source.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not files:
            raise ValueError(f"{source}: no text in this folder: no file that ends in {', '.join(SUFFIXES)}")
        return "\n\n".join(map(_read_file, files))
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder")
    return _read_file(source)


def builtin_text() -> str:
    """The language reference as ``help()`` shows it, about 465 kB of English; it differs a little between Pythons."""
    import pydoc_data.topics  # half a megabyte

    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name].strip("\n") for name in sorted(topics)) + "\n"


def split(text: str) -> tuple[str, str]:
    """(to train on, to validate on): the last tenth of the characters is held out."""
    end = int(len(text) * (1 - HELD_OUT))
    return text[:end], text[end:]


def tokenize(text: str, tokenizer: Tokenizer, context: int) -> TokenizedText:
    """Both parts of ``text`` as tokens.

    Raises:
        ValueError: a part is shorter than a window of ``context`` tokens and the one after them.
    """
    dtype = torch.uint16 if tokenizer.vocab_size <= 2**16 else torch.int32
    parts = []
    for name, part in zip(("to train on", "to validate on"), split(text), strict=True):
        ids = tokenizer.encode(part)
        if len(ids) < context + 1:
            raise ValueError(
                f"the text is too short: the part {name} must have more than the context's {context} tokens; "
                f"got {len(ids)} of {len(text):,} characters"
            )
        parts.append(torch.tensor(ids, dtype=dtype))
    return TokenizedText(*parts)


def windows(tokens: Tensor, starts: Tensor, length: int) -> Tensor:  # (N,), (B,) int64 -> (B, length) int64
    """The ``length`` tokens from each of ``starts`` on."""
    return tokens.unfold(0, length, 1)[starts].long()


def consecutive_windows(tokens: Tensor, length: int, batch: int, most: int | None = None) -> Iterator[Tensor]:
    """Batches (<= batch, length) of windows that overlap by one token: each token but the first is a target once.

    A rest shorter than a window is left out. ``most``: no more windows than these, spread evenly.
    """
    starts = torch.arange(0, len(tokens) - length + 1, length - 1)
    if most is not None and len(starts) > most:
        starts = starts[torch.linspace(0, len(starts) - 1, most).long()]
    for part in starts.split(batch):
        yield windows(tokens, part, length)


def _read_file(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"{path}: not a file")
    content = path.read_bytes()
    if not content:
        raise ValueError(f"{path}: empty: the file has 0 bytes")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")
