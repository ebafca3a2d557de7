"""What the documents say of speed on a GPU, made from what is committed: places between two HTML comments."""

from primer_fast.bench import scoreboard
from primer_fast.bench.agenda import AGENDA
from primer_fast.bench.report import Report
from primer_fast.bench.results import Results
from primer_fast.bench.scoreboard import Line
from primer_fast.bench.stages import RIGHT, failures
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
    if (document.count(BEGIN), document.count(END)) != (1, 1) or document.index(BEGIN) > document.index(END):
        raise ValueError(f"it must have one place between {BEGIN} and {END}")
    before, _, rest = document.partition(BEGIN)
    return "\n".join([before + BEGIN, "\n\n".join(_parts(results, whole)), END + rest.partition(END)[2]])


def _parts(results: Results, whole: bool) -> list[str]:
    every = [*results.stages, *results.ops, *results.trials]
    on_gpus = [found for found in every if found.content.header["kind"] == "cuda"]
    parts = []
    for machine in dict.fromkeys(found.machine for found in on_gpus):
        headers = [found.content.header for found in on_gpus if found.machine == machine]
        date = max(header["date"] for header in headers)[:10]
        parts.append(f"{headers[0]['device']}, {date} (`bench/results/{machine}`):")
        parts += [_wrong(found.content) for found in results.newest(RIGHT) if found.machine == machine]
        lines = _lines(results, machine, whole)
        parts.append(scoreboard.markdown(lines) if lines else "Nothing that a target is set for was timed.")
    return parts or [NOTHING]


def _wrong(stage) -> str:
    count, wrong = sum(bool(row["passed"]) for row in stage.rows), failures(stage)
    checks = f"{count:,} check{'s' * (count != 1)} against PyTorch in float64 passed"
    return f"{checks}, none failed." if not wrong else f"**{len(wrong):,} failed**, for example {wrong[0]}; {checks}."


def _lines(results: Results, machine: str, whole: bool) -> list[Line]:
    """Of the newest runs: the rows of the agenda, then whole programs."""
    named = {(e.op, case, e.precision, p) for e in AGENDA for case in e.cases for p in e.passes}
    by_target: dict[tuple, list[Line]] = {}
    for found in newest_ops(results):
        if found.machine == machine and found.content.header["kind"] == "cuda":
            kept = Report(found.content.header, [row for row in found.content.rows if row.group in named])
            for group in kept.groups():
                for line in scoreboard.of_ops(Report(kept.header, group)):
                    op, _, precision, pass_name = group[0].group
                    by_target.setdefault((op, precision, pass_name, line.target), []).append(line)
    for (where, name, setting), (found, trials) in newest_trials(results).items():
        if where == machine and found.content.header["kind"] == "cuda":
            for line in scoreboard.of_programs(TrialReport(found.content.header, trials)):
                by_target.setdefault((name, setting, line.target), []).append(line)
    if whole:
        return [line for lines in by_target.values() for line in lines]
    return [_worst(lines) for lines in by_target.values()]


def _worst(lines: list[Line]) -> Line:
    worst = min(lines, key=lambda line: line.ratio)
    return worst._replace(what=f"{worst.what} (worst of {len(lines)})") if len(lines) > 1 else worst
