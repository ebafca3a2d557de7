"""What the documents say of speed on a GPU, made from what is committed: places between two HTML comments."""

from primer_fast.bench import scoreboard
from primer_fast.bench.agenda import ROWS
from primer_fast.bench.files import filled
from primer_fast.bench.report import Report
from primer_fast.bench.results import Results
from primer_fast.bench.scoreboard import Line
from primer_fast.bench.stages import RIGHT, Stage, failures
from primer_fast.bench.trial import TrialReport
from primer_fast.bench.verdicts import newest_ops, newest_trials

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
    every = [*results.stages, *results.ops, *results.trials]
    on_gpus = [found for found in every if found.content.header["kind"] == "cuda"]
    parts = []
    for machine in dict.fromkeys(found.machine for found in on_gpus):
        headers = [found.content.header for found in on_gpus if found.machine == machine]
        date = max(header["date"] for header in headers)[:10]
        parts.append(f"{headers[0]['device']}, {date} (`bench/results/{machine}`):")
        parts += [_right(found.content) for found in results.newest(RIGHT) if found.machine == machine]
        reports = [f.content for f in newest_ops(results) if f.machine == machine and f in results.of_gpus()]
        lines = [*_of_ops(reports), *_of_programs(results, machine)]
        parts += [scoreboard.markdown(line for _, line in (lines if whole else _worst(lines)))] if lines else []
        if missing := set(ROWS) - {row.group for report in reports for row in report.rows}:
            parts.append(f"Not measured: {len(missing)} of the {len(ROWS)} cases of single ops that come first.")
    return parts or [NOTHING]


def _right(stage: Stage) -> str:
    wrong, passed = failures(stage), sum(bool(row["passed"]) for row in stage.rows)
    checks = f"of what the kernels compute, {passed:,} checks passed and {len(stage.left_out):,} had no time"
    return f"**{len(wrong):,} failed**, for example {wrong[0]}; {checks}." if wrong else f"None failed; {checks}."


def _of_ops(reports: list[Report]) -> list[tuple[tuple, Line]]:
    """The rows of the agenda, each with what tells its target from the others'."""
    groups = [(report.header, group) for report in reports for group in report.groups() if group[0].group in ROWS]
    return [
        ((row.op, row.precision, row.pass_name, line.target), line)
        for header, (row, *others) in groups
        for line in scoreboard.of_ops(Report(header, [row, *others]))
    ]


def _of_programs(results: Results, machine: str) -> list[tuple[tuple, Line]]:
    mine = [
        (key, TrialReport(found.content.header, trials))
        for (where, *key), (found, trials) in newest_trials(results).items()
        if where == machine and found.content.header["kind"] == "cuda"
    ]
    return [((*key, line.target), line) for key, report in mine for line in scoreboard.of_programs(report)]


def _worst(lines: list[tuple[tuple, Line]]) -> list[tuple[tuple, Line]]:
    """One line for each target: the case that is furthest from it."""
    by_target: dict[tuple, list[Line]] = {}
    for key, line in lines:
        by_target.setdefault(key, []).append(line)
    worst = []
    for key, of in by_target.items():
        line = min(of, key=lambda line: line.ratio)
        worst.append((key, line._replace(what=f"{line.what} (worst of {len(of)})") if len(of) > 1 else line))
    return worst
