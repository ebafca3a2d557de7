"""What the rows of `make gpu`'s checks say in words: those of report.py that are not times."""

import math
from collections.abc import Iterable

from primer_fast.bench.report import COMPILE, RIGHT, SANITIZER, Report


def failures(report: Report) -> list[str]:
    """What was wrong, a line each."""
    if report.kind == RIGHT:
        return [line(row) for row in report.rows if wrong(row)]
    if report.kind == COMPILE:
        return [f"{row['what']} does not compile: {error}" for row in report.rows for error in row["errors"]]
    if report.kind == SANITIZER:
        found = [row for row in report.rows if row["errors"]]
        return [f"{row['tool']}: {row['errors']} errors{_first('; '.join(row['lines'][:3]))}" for row in found]
    return [f"{row['op']} tuned, {row['site']}: {row['status']}" for row in report.rows if failed(row)]


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
    reason = _first(row.get("reason") or "")
    if row["error"] is None or row["budget"] is None:
        return f"{name_of(row)}: {reason.removeprefix(': ') or 'no reason is given'}"
    return f"{name_of(row)}: error {row['error']:.2g}, budget {row['budget']:.2g}{reason}"


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


def _first(lines: list[str] | str) -> str:
    """The first line, behind a colon; nothing if there is none."""
    lines = lines.splitlines() if isinstance(lines, str) else lines
    return f": {lines[0].strip()}" if lines else ""
