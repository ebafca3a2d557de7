"""What the documents say of speed on a GPU, made from what is committed: places between two HTML comments."""

from primer_fast.bench.agenda import ROWS
from primer_fast.bench.files import filled
from primer_fast.bench.report import FAST, PROGRAMS, RIGHT, Report
from primer_fast.bench.results import Results
from primer_fast.bench.stages import scoreboard
from primer_fast.bench.stages.scoreboard import Line
from primer_fast.bench.stages.stages import failures
from primer_fast.bench.stages.verdicts import newest_ops, newest_programs

BEGIN = "<!-- GPU figures: `make keep` writes what stands between here and the next comment -->"
END = "<!-- end of the GPU figures -->"
NOTHING = "Not measured on a GPU yet: no run on one is committed."


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
        lines = {key: scoreboard.lines_of(Report(kind, {}, rows)) for key, (kind, rows) in groups.items()}
        shown = [line for some in lines.values() for line in some] if whole else _worst(lines)
        parts += [scoreboard.markdown(shown)] if shown else []
        if missing := set(ROWS) - groups.keys():
            parts.append(f"Not measured: {len(missing)} of the {len(ROWS)} cases of single ops that come first.")
    return parts or [NOTHING]


def _right(report: Report) -> str:
    wrong, passed = failures(report), sum(bool(row["passed"]) for row in report.rows)
    checks = f"of what the kernels compute, {passed:,} checks passed and {len(report.left_out):,} had no time"
    return f"**{len(wrong):,} failed**, for example {wrong[0]}; {checks}." if wrong else f"None failed; {checks}."


def _groups(results: Results, machine: str) -> dict[tuple, tuple[str, list]]:
    """The newest comparisons on a GPU: single ops of the agenda, then whole programs; each with its kind of report."""
    of_ops = [found.content for found in newest_ops(results) if found.machine == machine and found in results.of_gpus()]
    found = {rows[0].group: (FAST, rows) for report in of_ops for rows in report.groups() if rows[0].group in ROWS}
    return found | {
        group: (PROGRAMS, rows)
        for (where, *group), (file, rows) in newest_programs(results).items()
        if where == machine and file.content.header["kind"] == "cuda"
        for group in [tuple(group)]
    }


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
