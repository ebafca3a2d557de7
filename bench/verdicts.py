"""Every target against the newest figures there are: met, missed, or not measured and why."""

from dataclasses import dataclass, replace
from typing import NamedTuple

from primer_fast.bench import op as ops
from primer_fast.bench.goals import DECLARED
from primer_fast.bench.report import Report
from primer_fast.bench.results import Found, Results
from primer_fast.bench.trial import OK, Trial

MET, MISSED, NOT_MEASURED = "met", "missed", "not measured"
KINDS = {"cpu": "CPU", "cuda": "GPU"}
_METRICS = {
    "share": "share of the measured ceiling", "host_us": "host time of a call (us)", "median_ms": "time (ms)",
    "peak_mib": "peak memory (MiB)", "rate": "rate (TFLOP/s)",
}  # fmt: skip


class Figure(NamedTuple):
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


def newest_trials(results: Results) -> dict[tuple[str, str, str], tuple[Found, list[Trial]]]:
    """By machine, name and setting: the last comparison, and the file it stands in."""
    newest = {}
    for found in results.trials:  # oldest first
        for comparison in found.content.comparisons():
            newest[found.machine, comparison[0].name, comparison[0].setting] = found, comparison
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


def _of_programs(results: Results) -> list[Verdict]:
    judged: dict[tuple, list[Figure]] = {}
    silent: dict[tuple[str, str], str] = {}
    measured_kinds = set()
    for (machine, name, setting), (found, comparison) in newest_trials(results).items():
        kind = found.content.header["kind"]
        measured_kinds.add(kind)
        first = name.split(" of ")[0]
        subject, case = (first, name) if first in ("call", "launch") else (name, setting)
        for trial in comparison:
            if trial.status != OK:
                silent.setdefault((kind, subject), f"{trial.provider}: {trial.reason}")
            for target in trial.targets:
                figure = Figure(case, target["value"], target["met"])
                judged.setdefault((kind, machine, subject, target["what"]), []).append(figure)
    made = [Verdict(*key, _worst_first(key[-1], figures)) for key, figures in judged.items()]
    for kind, declared in DECLARED.items():
        for subject, goal in declared:
            if not any((v.kind, v.subject, v.what) == (kind, subject, goal.what) for v in made):
                nothing = f"no {KINDS[kind]} run of whole programs is committed"
                reason = nothing if kind not in measured_kinds else silent.get((kind, subject), "no run measures it")
                made.append(Verdict(kind, "", subject, goal.what, reason=reason))
    return sorted(made, key=lambda verdict: list(DECLARED).index(verdict.kind))


def _of_ops(results: Results) -> list[Verdict]:
    made = []
    for found in newest_ops(results):
        report: Report = found.content
        judged: dict[tuple[str, str], list[Figure]] = {}
        for row in report.rows:
            for target in row.targets:
                figure = Figure(f"{row.case}, {row.precision}, {row.pass_name}", target["value"], target["met"])
                judged.setdefault((row.op, target["what"]), []).append(figure)
        kind = report.header["kind"]
        made += [Verdict(kind, found.machine, *key, _worst_first(key[1], f)) for key, f in judged.items()]
    gpu = bool(results.of_gpus())
    for name in ops.names():
        for what in dict.fromkeys(map(str, ops.load(name).targets)):
            if not any((v.kind, v.subject, v.what) == ("cuda", name, what) for v in made):
                reason = "no committed run measures it" if gpu else "no GPU run is committed"
                made.append(Verdict("cuda", "", name, what, reason=reason))
    return made


def _worst_first(what: str, figures: list[Figure]) -> tuple[Figure, ...]:
    return tuple(sorted(figures, key=lambda figure: figure.value, reverse="<=" in what))
