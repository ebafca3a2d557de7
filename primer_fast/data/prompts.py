"""Prompts, and prompts with the completions to learn, of a user's files."""

import json
from pathlib import Path


def read_completions(path: str | Path) -> list[tuple[str, str]]:
    """(prompt, completion) of each line of a JSON Lines file; of a preference file the chosen completion.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not such an object, or the file holds none; the message names file, line and field.
    """
    found = []
    for number, row in _objects(path):
        field = "completion" if "completion" in row else "chosen"
        if field not in row:
            raise ValueError(f"{path}, line {number}: completion is missing; got {', '.join(row) or 'no fields'}")
        for name in ("prompt", field):
            if not isinstance(row.get(name), str):
                got = type(row[name]).__name__ if name in row else "none"
                raise ValueError(f"{path}, line {number}: {name} must be a string; got {got}")
        if not row[field]:
            raise ValueError(f"{path}, line {number}: {field} must not be empty")
        found.append((row["prompt"], row[field]))
    return found


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a file, each once: "prompt" of each line of a .jsonl file, else each line that is not blank.

    Errors as ``read_completions``.
    """
    if Path(path).suffix == ".jsonl":
        prompts = []
        for number, row in _objects(path):
            if not isinstance(row.get("prompt"), str):
                raise ValueError(f"{path}, line {number}: prompt must be a string; got {row.get('prompt')!r}")
            prompts.append(row["prompt"])
    else:
        prompts = [line for line in _text(path).splitlines() if line.strip()]
        if not prompts:
            raise ValueError(f"{path}: must hold at least one prompt; got an empty file")
    return list(dict.fromkeys(prompts))


def _objects(path: str | Path) -> list[tuple[int, dict]]:
    """(line number, object) of the lines that are not blank."""
    rows = []
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: must be a JSON object; {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: must be a JSON object; got {type(row).__name__}")
        rows.append((number, row))
    if not rows:
        raise ValueError(f"{path}: must hold at least one JSON object; got an empty file")
    return rows


def _text(path: str | Path) -> str:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: must be UTF-8 text; byte {error.start} is not") from error
