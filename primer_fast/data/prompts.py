"""Prompts, and prompts with the completions to learn, of a user's files."""

__all__ = ["read_completions", "read_prompts"]

import json
from pathlib import Path

from primer_fast.data.lines import OBJECTS, holds_objects, read_lines, read_objects


def read_completions(path: str | Path) -> list[tuple[str, str]]:
    """(prompt, completion) of each line of a JSON Lines file; of a preference file the chosen completion.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not such an object, or the file holds none; the message names file, line and field.
    """
    found = []
    for number, row in read_objects(path):
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
    if not found:
        raise ValueError(f"{path}: must hold at least one JSON object; got an empty file")
    return found


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a file, each once: "prompt" of each line of a JSON Lines file, else each line that is not blank.

    The end of its name says that a file holds JSON Lines: .jsonl, .ndjson or .json.

    Errors as ``read_completions``; and a ValueError for objects with a "prompt" in a file of another name.
    """
    if holds_objects(path):
        prompts = []
        for number, row in read_objects(path):
            if not isinstance(row.get("prompt"), str):
                raise ValueError(f"{path}, line {number}: prompt must be a string; got {row.get('prompt')!r}")
            prompts.append(row["prompt"])
    else:
        prompts = [line for line in read_lines(path) if line.strip()]
        if prompts and _is_object(prompts[0]):
            raise ValueError(f"{path}: prompts in JSON objects must be in a file that ends in {' or '.join(OBJECTS)}")
    if not prompts:
        raise ValueError(f"{path}: must hold at least one prompt; got an empty file")
    return list(dict.fromkeys(prompts))


def _is_object(line: str) -> bool:
    """Whether a line of text is a JSON object with a prompt."""
    try:
        return "prompt" in (json.loads(line) if line.lstrip().startswith("{") else ())
    except (ValueError, RecursionError):
        return False
