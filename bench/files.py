"""Writing files of results: a reader finds the old content or the new, never half of either.

Documents have places for results, between two comments.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from primer_fast.files import replace_files


def replace_text(path: str | Path, text: str) -> None:
    """Write under a temporary name, then rename; folders that are missing are made."""
    replace_texts({Path(path): text})


def replace_texts(texts: Mapping[Path, str]) -> None:
    """Several files: all are written under temporary names before the first is renamed."""
    for path in texts:
        path.parent.mkdir(parents=True, exist_ok=True)
    replace_files({path: text + "\n" for path, text in texts.items()})


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def filled(document: str, begin: str, end: str, content: str) -> str:
    """``document`` with ``content`` on lines of its own between two comments, in place of what was there.

    Raises:
        ValueError: the document has no such place, or more than one.
    """
    if (document.count(begin), document.count(end)) != (1, 1) or document.index(begin) > document.index(end):
        raise ValueError(f"it must have one place between {begin} and {end}")
    before, rest = document.split(begin)
    return "\n".join([before + begin, content, end + rest.split(end)[1]])
