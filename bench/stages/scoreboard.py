"""Targets beside what was measured, one line each: what a page about a GPU begins with."""

from collections.abc import Iterable
from typing import NamedTuple

from primer_fast.bench.agenda import ROWS
from primer_fast.bench.files import markdown_table
from primer_fast.bench.op import FORWARD, OURS
from primer_fast.bench.report import OK, OpRow, ProgramRow, Report
from primer_fast.bench.stages.verdicts import readable
from primer_fast.bench.tables import number

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
        """A missed target's ratio is bold."""
        ratio = number(self.ratio, 3)
        return [self.what, self.target, number(self.measured, 3), ratio if self.met else f"**{ratio}**", self.other]


def lines_of(report: Report) -> list[Line]:
    """The targets of a report of ops, those of the agenda first and in its order, or of whole programs."""
    order = {key: place for place, key in enumerate(ROWS)}
    groups = sorted(report.groups(), key=lambda rows: order.get(rows[0].group, len(order)))
    return [
        # Files from before there were ratios say only whether a target is met
        Line(_name(row), readable(target["what"]), target["value"], target.get("ratio", float(target["met"])),
             target["met"], _fastest(rows))
        for rows in groups
        for row in rows
        for target in row.targets
    ]  # fmt: skip


def markdown(lines: Iterable[Line]) -> str:
    """A table."""
    return markdown_table(COLUMNS, [line.cells() for line in lines])


def _name(row: OpRow | ProgramRow) -> str:
    if isinstance(row, ProgramRow):
        return row.name
    precision = "" if row.precision == "bfloat16" else f", {row.precision}"
    return f"{row.op} {row.case}{precision}" + ("" if row.pass_name == FORWARD else f", {row.pass_name}")


def _fastest(rows: list[OpRow] | list[ProgramRow]) -> str:
    """Of the other providers that compute the same, unlike a bare product or copy."""
    others = [row for row in rows if not row.provider.startswith(OURS) and row.status == OK]
    others = [row for row in others if isinstance(row, ProgramRow) or row.error is not None]
    if not others:
        return "-"
    best = min(others, key=lambda row: row.median_ms)
    rate = f", {number(best.rate, 3)} {best.unit}" if isinstance(best, OpRow) else ""
    return f"{best.provider}: {number(best.median_ms, 3)} ms{rate}"
