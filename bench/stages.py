"""What the stages of `make gpu` leave beside reports of ops and of programs: whether it was right, compiled, tuned.

{"schema": ..., "header": environment.describe's, "rows": [...]}, and what else SCHEMAS names; ``left_out`` holds what
there was no time for.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from primer_fast.bench.files import replace_text

KINDS = RIGHT, COMPILE, SANITIZER, TUNE = "right", "compile", "sanitizer", "tune"
HEADER_KEYS = ("device", "kind", "date", "torch", "triton", "python", "source")
PASSED, ERRORS, STOPPED, FAILED, NOT_AVAILABLE = "passed", "errors", "stopped", "failed", "not available"
TOOL_STATUSES = (PASSED, ERRORS, STOPPED, FAILED, NOT_AVAILABLE)  # of a row of ``sanitizer``


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


@dataclass
class Stage:
    """One stage's file. ``beside``: the numbers of the whole stage, by name."""

    kind: str  # RIGHT, COMPILE, SANITIZER or TUNE
    header: dict
    rows: list[dict] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    beside: dict[str, float] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write JSON; a reader never sees half a file."""
        schema = next(name for name, schema in SCHEMAS.items() if schema.kind == self.kind)
        content = {"schema": schema, "header": self.header, **self.beside, "rows": self.rows, "left_out": self.left_out}
        replace_text(path, json.dumps(content, indent=1, allow_nan=False))


def load(path: str | Path, kind: str) -> Stage:
    """``parse`` of a file of one kind, with its errors; a file that is not JSON is a ValueError too."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: must be JSON; {error}") from error
    stage = parse(data, path)
    if stage.kind != kind:
        raise ValueError(f"{path}: it must be of the stage {kind}; its schema is that of {stage.kind}")
    return stage


def parse(data: dict, where: str | Path) -> Stage:
    """A stage from what was read as JSON.

    Raises:
        ValueError: another schema; no header, or one without an entry; no rows, or one without a column or whose
            columns contradict each other.
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
        if wrong_form := _contradiction(schema.kind, row):
            raise ValueError(f"{where}: row {number}: {wrong_form}")
    left_out = data.get("left_out", [])
    if not (isinstance(left_out, list) and all(isinstance(name, str) for name in left_out)):
        raise ValueError(f"{where}: left_out must be names; got {left_out!r}")
    beside = {name: data.get(name) for name in sorted(schema.beside)}
    if wrong := [name for name, value in beside.items() if not isinstance(value, int | float)]:
        raise ValueError(f"{where}: must have the numbers {', '.join(beside)}; got none for {', '.join(wrong)}")
    return Stage(schema.kind, header, rows, left_out, beside)


def _contradiction(kind: str, row: dict) -> str:
    """What cannot be in a row that has all its columns; "" if it can."""
    if kind == RIGHT:
        error, budget, passed = row["error"], row["budget"], row["passed"]
        if passed not in (True, False, None):
            return f"passed must be true, false or null; got {passed!r}"
        if passed and None not in (error, budget) and not error <= budget:
            return f"it has passed, so its error must be within its budget; got {error} and {budget}"
    if kind == SANITIZER:
        status, errors = row["status"], row["errors"]
        if status not in TOOL_STATUSES:
            return f"status must be one of {', '.join(TOOL_STATUSES)}; got {status!r}"
        if (status == PASSED and errors != 0) or (status == ERRORS and not errors):
            return f"it is {status!r}, which does not go with errors {errors!r}"
    return ""


def failures(stage: Stage) -> list[str]:
    """What was wrong, a line each."""
    if stage.kind == RIGHT:
        return [line(row) for row in stage.rows if wrong(row)]
    if stage.kind == COMPILE:
        return [f"{row['what']} does not compile: {error}" for row in stage.rows for error in row["errors"]]
    if stage.kind == SANITIZER:
        found = [row for row in stage.rows if row["errors"]]
        return [f"{row['tool']}: {row['errors']} errors{_first('; '.join(row['lines'][:3]))}" for row in found]
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


def tool_line(row: dict) -> str:
    """A row of ``sanitizer``: its status with the number of errors, or with the reason that nothing was counted."""
    counted = _first(row["lines"]) if row["errors"] is None else f", {row['errors']} errors"
    return f"{row['tool']}: {row['status']}{counted}"


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
