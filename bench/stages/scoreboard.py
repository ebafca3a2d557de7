"""Targets beside what was measured, one line each: what a page about a GPU begins with.

The documents say it too, made from what is committed: between two HTML comments.
"""

from collections.abc import Iterable
from typing import NamedTuple

from primer_fast.bench.agenda import ROWS
from primer_fast.bench.files import filled, markdown_table
from primer_fast.bench.op import FORWARD, OURS
from primer_fast.bench.report import OK, RIGHT, OpRow, ProgramRow, Report
from primer_fast.bench.results import Results
from primer_fast.bench.stages.stages import failures
from primer_fast.bench.stages.verdicts import newest_ops, newest_programs, readable
from primer_fast.bench.tables import number

BEGIN = "<!-- GPU figures: `make keep` writes what stands between here and the next comment -->"
END = "<!-- end of the GPU figures -->"
NOTHING = "Not measured on a GPU yet: no run on one is committed."
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
    return [line for rows in groups for line in _lines(rows)]


def _lines(rows: list) -> list[Line]:
    """The targets of rows that were timed against each other."""
    return [
        # Files from before there were ratios say only whether a target is met
        Line(_name(row), readable(target["what"]), target["value"], target.get("ratio", float(target["met"])),
             target["met"], _fastest(rows))
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


def refreshed(document: str, results: Results, whole: bool) -> str:
    """``document`` with its place filled: for each GPU a table with the worst case of every target, or with all cases.

    Raises:
        ValueError: the document has no such place, or more than one.
    """
    return filled(document, BEGIN, END, "\n\n".join(_parts(results, whole)))


def _parts(results: Results, whole: bool) -> list[str]:
    on_gpus = [found for found in results.reports if found.content.header["kind"] == "cuda"]
    parts = []
    for machine in dict.fromkeys(found.machine for found in on_gpus):
        headers = [found.content.header for found in on_gpus if found.machine == machine]
        date = max(header["date"] for header in headers)[:10]
        parts.append(f"{headers[0]['device']}, {date} (`bench/results/{machine}`):")
        parts += [_right(found.content) for found in results.newest(RIGHT) if found.machine == machine]
        groups = _groups(results, machine)
        lines = {key: _lines(rows) for key, rows in groups.items()}
        shown = [line for some in lines.values() for line in some] if whole else _worst(lines)
        parts += [markdown(shown)] if shown else []
        if missing := set(ROWS) - groups.keys():
            parts.append(f"Not measured: {len(missing)} of the {len(ROWS)} cases of single ops that come first.")
    return parts or [NOTHING]


def _right(report: Report) -> str:
    wrong, passed = failures(report), sum(bool(row["passed"]) for row in report.rows)
    checks = f"of what the kernels compute, {passed:,} checks passed and {len(report.left_out):,} had no time"
    return f"**{len(wrong):,} failed**, for example {wrong[0]}; {checks}." if wrong else f"None failed; {checks}."


def _groups(results: Results, machine: str) -> dict[tuple, list]:
    """The newest comparisons on a GPU: single ops of the agenda, then whole programs."""
    of_ops = [found.content for found in newest_ops(results) if found.machine == machine and found in results.of_gpus()]
    groups = {rows[0].group: rows for report in of_ops for rows in report.groups() if rows[0].group in ROWS}
    for (where, *group), (file, rows) in newest_programs(results).items():
        if where == machine and file.content.header["kind"] == "cuda":
            groups[tuple(group)] = rows
    return groups


def _worst(lines: dict[tuple, list[Line]]) -> list[Line]:
    """One line for each target: the case that is furthest from it."""
    by_target: dict[tuple, list[Line]] = {}
    for key, some in lines.items():
        apart = (key[0], *key[2:]) if len(key) == 4 else key  # the cases of an op share a target
        for line in some:
            by_target.setdefault((*apart, line.target), []).append(line)
    worst = []
    for of in by_target.values():
        line = min(of, key=lambda line: line.ratio)
        worst.append(line._replace(what=f"{line.what} (worst of {len(of)})") if len(of) > 1 else line)
    return worst
