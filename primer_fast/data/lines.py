"""Lines of text files, and the objects of JSON Lines files; what is wrong with one is said with its file and line."""

__all__ = [
    "holds_objects",
    "number_of",
    "read_lines",
    "read_objects",
]

import json
import re
from collections.abc import Iterator
from pathlib import Path

OBJECTS = (".json", ".jsonl", ".ndjson")  # how the names of JSON Lines files end, in letters of either size
LARGEST = 1e38  # of a number that is read: the difference of two such numbers is one that float32 holds
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def read_lines(path: str | Path) -> list[str]:
    """The lines of a UTF-8 file without their ends; a byte order mark is dropped.

    A line ends with a line feed, a carriage return or both, and with nothing else: U+2028 may stand in a text.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a folder, or not UTF-8.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: must be a file; got a folder")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: must be UTF-8 text; byte {error.start} is not") from error
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


def read_objects(path: str | Path) -> Iterator[tuple[int, dict]]:
    """(line number, object) of the lines of a JSON Lines file that are not blank.

    Raises:
        FileNotFoundError, ValueError: as ``read_lines``; or a line is not an object, or has half a character.
    """
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise ValueError(f"{path}, line {number}: must hold whole characters; got {half!r} alone") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: must be a JSON object; {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: must be a JSON object; got {type(row).__name__}")
        yield number, row


def holds_objects(path: str | Path) -> bool:
    """Whether the name of a file says that it holds JSON Lines."""
    return Path(path).suffix.lower() in OBJECTS


def number_of(text: str) -> float | None:
    """The number that ``text`` is in decimal digits, as "-1.5" or "2e-3"; None for what is none, or beyond LARGEST.

    ``float`` takes more than people write as a number: "1_0", digits of other scripts, "nan", "infinity".
    """
    if not _NUMBER.fullmatch(text.strip(" ")):
        return None
    value = float(text)
    return value if abs(value) <= LARGEST else None
