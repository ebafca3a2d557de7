"""What the stages of `make gpu` leave beside reports of ops and of programs: whether it was right, compiled, tuned.

{"schema": ..., "header": environment.describe's, "rows": [...]}, and what else SCHEMAS names; ``left_out`` holds what
there was no time for.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

KINDS = RIGHT, COMPILE, SANITIZER, TUNE = "right", "compile", "sanitizer", "tune"
HEADER_KEYS = ("device", "kind", "date", "torch", "triton", "python")


class Schema(NamedTuple):
    kind: str
    row: frozenset[str]  # what every row must have
    figures: frozenset[str] = frozenset()  # what is a number or None, where a row has it
    beside: frozenset[str] = frozenset()  # numbers beside the rows


_RIGHT = frozenset({"check", "op", "case", "dtype", "tensor", "error", "budget", "passed"})
SCHEMAS = {
    "right 1": Schema(RIGHT, _RIGHT, frozenset({"error", "budget"})),
    "compiled 1": Schema(COMPILE, frozenset({"what", "errors"}), beside=frozenset({"launches", "seconds"})),
    "sanitizer 1": Schema(SANITIZER, frozenset({"tool", "status", "errors", "lines"}), frozenset({"errors"})),
    "tune 1": Schema(TUNE, frozenset({"site", "op", "status"}), frozenset({"seconds", "default_seconds"})),
}


@dataclass(frozen=True)
class Stage:
    """One stage's file. ``beside``: the numbers of the whole stage, by name."""

    kind: str  # RIGHT, COMPILE, SANITIZER or TUNE
    header: dict
    rows: list[dict]
    beside: dict[str, float]
    left_out: list[str]


def parse(data: dict, where: str | Path) -> Stage:
    """A stage from what was read as JSON.

    Raises:
        ValueError: another schema; no header, or one without an entry; no rows, or one without a column.
    """
    schema = SCHEMAS.get(str(data.get("schema"))) if isinstance(data, dict) else None
    if schema is None:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"{where}: schema must be one of {', '.join(SCHEMAS)}; got {found!r}")
    header, rows = data.get("header"), data.get("rows")
    if not (isinstance(header, dict) and isinstance(rows, list)):
        raise ValueError(f"{where}: must have a header and rows; got {', '.join(data)}")
    if missing := [key for key in HEADER_KEYS if key not in header]:
        raise ValueError(f"{where}: header must have {', '.join(HEADER_KEYS)}; missing {', '.join(missing)}")
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not schema.row <= row.keys():
            missing = sorted(schema.row - row.keys()) if isinstance(row, dict) else [repr(row)]
            raise ValueError(f"{where}: row {number} must have {', '.join(sorted(schema.row))}; missing {missing}")
        if strange := [key for key in sorted(schema.figures) if not isinstance(row.get(key), int | float | None)]:
            raise ValueError(f"{where}: row {number}: {strange[0]} must be a number or null; got {row[strange[0]]!r}")
    beside = {name: data.get(name) for name in sorted(schema.beside)}
    if wrong := [name for name, value in beside.items() if not isinstance(value, int | float)]:
        raise ValueError(f"{where}: must have the numbers {', '.join(beside)}; got none for {', '.join(wrong)}")
    return Stage(schema.kind, header, rows, beside, data.get("left_out", []))


def failures(stage: Stage) -> list[str]:
    """What was wrong, a line each."""
    if stage.kind == RIGHT:
        return [line(row) for row in stage.rows if wrong(row)]
    if stage.kind == COMPILE:
        return [f"{row['what']} does not compile{_first(row['errors'])}" for row in stage.rows if row["errors"]]
    if stage.kind == SANITIZER:
        return [f"{row['tool']}: {row['errors']} errors{_first(row['lines'])}" for row in stage.rows if row["errors"]]
    return [f"{row['op']} tuned, {row['site']}: {row['status']}" for row in stage.rows if failed(row)]


def wrong(row: dict) -> bool:
    """Whether a row of ``right`` failed; None says that there was nothing to try."""
    return row["passed"] is not None and not row["passed"]


def failed(row: dict) -> bool:
    """Whether a row of ``tune`` says that the settings in use are wrong or hang. Out of memory is not counted."""
    return row["status"].startswith("failed") and "OutOfMemory" not in row["status"]


def name_of(row: dict) -> str:
    """What a row of ``right`` is about."""
    return " ".join(str(row[key]) for key in ("op", "case", "dtype", "tensor", "check") if row[key])


def line(row: dict) -> str:
    """A row of ``right``: what it is about, and its error or the reason that there is none."""
    return f"{name_of(row)}: {_why(row)}"


def worst_first(rows: Iterable[dict]) -> list[dict]:
    """Rows of ``right`` that have an error and a budget, the largest part of the budget first."""
    return sorted((row for row in rows if row["error"] is not None and row["budget"]), key=lambda row: -part_of(row))


def part_of(row: dict) -> float:
    """Error over budget; NaN is more than any."""
    part = row["error"] / row["budget"]
    return math.inf if math.isnan(part) else part


def _why(row: dict) -> str:
    reason = _first(row.get("reason") or "")
    if row["error"] is None or row["budget"] is None:
        return reason.removeprefix(": ") or "no reason is given"
    return f"error {row['error']:.2g}, budget {row['budget']:.2g}{reason}"


def _first(lines: list[str] | str) -> str:
    """The first line, behind a colon; nothing if there is none."""
    lines = lines.splitlines() if isinstance(lines, str) else lines
    return f": {lines[0].strip()}" if lines else ""
