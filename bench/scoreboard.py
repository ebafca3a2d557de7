"""Targets beside what was measured, one line each: what a page about a GPU begins with."""

from collections.abc import Iterable
from typing import NamedTuple

from primer_fast.bench.agenda import ROWS
from primer_fast.bench.op import FORWARD, OURS
from primer_fast.bench.report import Report, Row
from primer_fast.bench.tables import number
from primer_fast.bench.trial import OK, Trial, TrialReport
from primer_fast.bench.verdicts import readable

COLUMNS = ("what", "target", "measured", "ratio", "best other")


class Line(NamedTuple):
    """One target. ``ratio``: 1 and more where it is met. ``other``: the fastest of the others in the same run."""

    what: str
    target: str
    measured: float
    ratio: float
    met: bool
    other: str

    def cells(self) -> list[str]:
        return [self.what, self.target, number(self.measured, 3), number(self.ratio, 3), self.other]


def of_ops(report: Report) -> list[Line]:
    """The targets of single ops, those of the agenda first, in its order."""
    order = {key: place for place, key in enumerate(ROWS)}
    groups = sorted(report.groups(), key=lambda rows: order.get(rows[0].group, len(order)))
    return [
        Line(_name(rows[0]), readable(target["what"]), target["value"], _ratio(target), target["met"], _fastest(rows))
        for rows in groups
        for row in rows
        if row.provider == OURS
        for target in row.targets
    ]


def of_programs(report: TrialReport) -> list[Line]:
    """The targets of whole programs."""
    return [
        Line(trials[0].name, target["what"], target["value"], _ratio(target), target["met"], _fastest_program(trials))
        for trials in report.comparisons()
        for trial in trials
        for target in trial.targets
    ]


def markdown(lines: Iterable[Line]) -> str:
    """A table; a missed target's ratio is bold."""
    rows = []
    for line in lines:
        what, target, measured, ratio, other = line.cells()
        rows.append((what, target, measured, ratio if line.met else f"**{ratio}**", other))
    head = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    return "\n".join([*head, *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)])


def _name(row: Row) -> str:
    precision = "" if row.precision == "bfloat16" else f", {row.precision}"
    return f"{row.op} {row.case}{precision}" + ("" if row.pass_name == FORWARD else f", {row.pass_name}")


def _ratio(target: dict) -> float:
    """Files from before there were ratios say only whether a target is met."""
    return target.get("ratio", 1.0 if target["met"] else 0.0)


def _fastest(rows: list[Row]) -> str:
    """Of the other providers that compute the same, the bare product or copy left out."""
    others = [row for row in rows if not row.provider.startswith(OURS) and row.status == "ok" and row.error is not None]
    if not others:
        return "-"
    best = min(others, key=lambda row: row.median_ms)
    return f"{best.provider}: {number(best.median_ms, 3)} ms, {number(best.rate, 3)} {best.unit}"


def _fastest_program(trials: list[Trial]) -> str:
    others = [trial for trial in trials if not trial.provider.startswith(OURS) and trial.status == OK]
    if not others:
        return "-"
    best = min(others, key=lambda trial: trial.median_ms)
    return f"{best.provider}: {number(best.median_ms, 3)} ms"
