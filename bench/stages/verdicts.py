"""Every target against the newest figures there are: met, missed, or not measured and why."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from primer_fast.bench import op as ops
from primer_fast.bench.goals import DECLARED
from primer_fast.bench.report import OK, ProgramRow
from primer_fast.bench.results import Found, Results

MET, MISSED, NOT_MEASURED = "met", "missed", "not measured"
KINDS = {"cpu": "CPU", "cuda": "GPU"}
_METRICS = {
    "share": "share of the measured ceiling", "host_us": "host time of a call (us)", "median_ms": "time (ms)",
    "peak_mib": "peak memory (MiB)", "rate": "rate (TFLOP/s)",
}  # fmt: skip


class Figure(NamedTuple):
    """The figure of one case beside its target."""

    case: str
    value: float
    met: bool


@dataclass(frozen=True)
class Verdict:
    """``figures``: one for each case that the target applies to, the worst first; none where it was not measured."""

    kind: str  # "cpu" or "cuda"
    machine: str  # the folder of bench/results; "" where nothing was measured
    subject: str
    what: str
    figures: tuple[Figure, ...] = ()
    reason: str = ""  # why there are none, or why they miss the target where that is known

    @property
    def result(self) -> str:
        if not self.figures:
            return NOT_MEASURED
        return MET if all(figure.met for figure in self.figures) else MISSED


def newest_programs(results: Results) -> dict[tuple[str, str, str], tuple[Found, list[ProgramRow]]]:
    """By machine, name and setting: the last comparison, and the file it stands in."""
    newest = {}
    for found in results.programs:  # oldest first
        for comparison in found.content.groups():
            newest[(found.machine, *comparison[0].group)] = found, comparison
    return newest


def newest_ops(results: Results) -> list[Found]:
    """The last report of ops of each machine and kind."""
    return list({(found.machine, found.content.header["kind"]): found for found in results.ops}.values())


def verdicts(results: Results) -> list[Verdict]:
    """All of them: whole programs, then single ops."""
    known = results.reasons
    return [
        replace(v, reason=known.get(v.subject, {}).get(v.what, "")) if v.result == MISSED else v
        for v in [*_of_programs(results), *_of_ops(results)]
    ]


def readable(what: str) -> str:
    """For example "versus torch >= 1" -> "time of torch over ours \u2265 1"."""
    for metric, words in _METRICS.items():
        if what.startswith(f"{metric} "):
            what = words + what.removeprefix(metric)
    if what.startswith("versus "):
        name, sign, bound = what.removeprefix("versus ").rpartition(" >= ")
        what = f"time of {name} over ours{sign}{bound}"
    return what.replace(">=", "\u2265").replace("<=", "\u2264")


def _judged(measured: Iterable[tuple[Found, list]]) -> list[Verdict]:
    """The targets that stand in rows."""
    judged: dict[tuple, list[Figure]] = {}
    for found, rows in measured:
        for row in rows:
            for target in row.targets:
                key = found.content.header["kind"], found.machine, row.subject, target["what"]
                judged.setdefault(key, []).append(Figure(row.which, target["value"], target["met"]))
    return [
        Verdict(*key, tuple(sorted(figures, key=lambda figure: figure.value, reverse="<=" in key[-1])))  # worst first
        for key, figures in judged.items()
    ]


def _of_programs(results: Results) -> list[Verdict]:
    newest = list(newest_programs(results).values())
    made = _judged(newest)
    silent: dict[tuple[str, str], str] = {}
    for found, comparison in newest:
        for row in comparison:
            if row.status != OK:
                silent.setdefault((found.content.header["kind"], row.subject), f"{row.provider}: {row.reason}")
    measured_kinds = {found.content.header["kind"] for found, _ in newest}
    for kind, declared in DECLARED.items():
        nothing = f"no {KINDS[kind]} run of whole programs is committed" if kind not in measured_kinds else ""
        for subject, goal in declared:
            reason = nothing or silent.get((kind, subject), "no run measures it")
            made += _unless_measured(made, kind, subject, goal.what, reason)
    return sorted(made, key=lambda verdict: list(DECLARED).index(verdict.kind))


def _of_ops(results: Results) -> list[Verdict]:
    made = _judged((found, found.content.rows) for found in newest_ops(results))
    reason = "no committed run measures it" if results.of_gpus() else "no GPU run is committed"
    for name in ops.names():
        for what in dict.fromkeys(goal.goal.what for goal in ops.load(name).goals):
            made += _unless_measured(made, "cuda", name, what, reason)
    return made


def _unless_measured(made: list[Verdict], kind: str, subject: str, what: str, reason: str) -> list[Verdict]:
    """A verdict that says why nothing was measured, where there is none."""
    known = any((v.kind, v.subject, v.what) == (kind, subject, what) for v in made)
    return [] if known else [Verdict(kind, "", subject, what, reason=reason)]
