"""Whole programs against each other as data: a training step, a generated text, a loss; how they are written and read.

bench/report.py is the same for single ops.
"""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from primer_fast.bench import environment
from primer_fast.bench.files import replace_text
from primer_fast.bench.report import judged
from primer_fast.bench.timing import quartiles

SCHEMA = "trials 1"
OK, FAILED, WRONG, NOT_AVAILABLE = "ok", "failed", "wrong", "not available"
STATUSES = (OK, FAILED, WRONG, NOT_AVAILABLE)
HEADER_KEYS = ("device", "kind", "date", "command", "torch", "python", "load_before")


@dataclass(frozen=True)
class Goal:
    """A bound on one figure of a comparison; the text of ``what`` says it in words."""

    what: str
    at_least: float = -math.inf
    at_most: float = math.inf

    def judged(self, value: float) -> dict:
        return {"what": self.what, **judged(value, self.at_least, self.at_most)}


@dataclass
class Trial:
    """One provider in one comparison. Figures are None where there is none; ``reason`` says why one has no figures.

    ``rate``: ``unit`` per second by the median. ``versus``: its time over ours, the median of the rounds' own ratios;
    ``versus_low`` and ``versus_high`` are their quartiles. ``peak_mib``: the most memory of one run beyond what was
    there before. ``loss``: the last one; ``loss_difference``: the largest distance from ours over all steps.
    ``targets``: what was asked for against this provider, or of ours alone, and whether it is met.
    """

    name: str
    setting: str
    provider: str
    status: str = OK
    reason: str = ""
    median_ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    samples: int = 0
    rate: float | None = None
    unit: str = ""
    versus: float | None = None
    versus_low: float | None = None
    versus_high: float | None = None
    peak_mib: float | None = None
    loss: float | None = None
    loss_difference: float | None = None
    targets: list[dict] = field(default_factory=list)

    def time(self, seconds: Sequence[float], ours: Sequence[float], work: float) -> None:
        """Fill in the figures of ``seconds`` per run beside those of ours, run by run; a run is ``work`` units."""
        self.low_ms, self.median_ms, self.high_ms = (1e3 * s for s in quartiles(seconds))
        self.samples, self.rate = len(seconds), work / self.median_ms * 1e3
        ratios = [theirs / own for theirs, own in zip(seconds, ours, strict=True)]
        self.versus_low, self.versus, self.versus_high = quartiles(ratios)


@dataclass
class TrialReport:
    """``left_out``: the programs for which there was no time."""

    header: dict
    trials: list[Trial] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def comparisons(self) -> list[list[Trial]]:
        """Trials of the same name and setting, in the order measured."""
        found: dict[tuple, list[Trial]] = {}
        for trial in self.trials:
            found.setdefault((trial.name, trial.setting), []).append(trial)
        return list(found.values())

    def save(self, path: str | Path) -> None:
        """Write JSON; a reader never sees half a file."""
        replace_text(path, json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1, allow_nan=False))


def header(device: str, command: str, small: bool = False) -> dict:
    """The machine and the software, the command that measures, and how busy the machine is before it does."""
    return environment.describe(device, small) | {"command": command, "load_before": os.getloadavg()[0]}


def parse(data: dict, where: str | Path) -> TrialReport:
    """A report from what was read as JSON.

    Raises:
        ValueError: another schema, a missing header entry, an unknown or missing column, a figure that cannot be.
    """
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"trials {where}: schema must be {SCHEMA!r}; got {found!r}")
    found_header, rows, left_out = data.get("header"), data.get("trials"), data.get("left_out", [])
    if not (isinstance(found_header, dict) and isinstance(rows, list)):
        raise ValueError(f"trials {where}: must have a header and trials; got {', '.join(data)}")
    if not (isinstance(left_out, list) and all(isinstance(name, str) for name in left_out)):
        raise ValueError(f"trials {where}: left_out must be names; got {left_out!r}")
    if missing := [key for key in HEADER_KEYS if key not in found_header]:
        raise ValueError(f"trials {where}: header must have {', '.join(HEADER_KEYS)}; missing {', '.join(missing)}")
    return TrialReport(found_header, [_checked(where, number, row) for number, row in enumerate(rows)], left_out)


def load(path: str | Path) -> TrialReport:
    """``parse`` of a file, with its errors; a file that is not JSON is a ValueError too."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"trials {path}: must be JSON; {error}") from error
    return parse(data, path)


def _checked(where: str | Path, number: int, data: dict) -> Trial:
    def refuse(what: str) -> ValueError:
        return ValueError(f"trials {where}: trial {number} {what}")

    if not isinstance(data, dict):
        raise refuse(f"must be a set of columns; got {data!r}")
    if unknown := sorted(set(data) - {f.name for f in fields(Trial)}):
        raise refuse(f"has unknown columns: {', '.join(unknown)}")
    try:
        trial = Trial(**data)
    except TypeError as error:
        raise refuse(f"is not a trial: {error}") from error
    if trial.status not in STATUSES:
        raise refuse(f"must have a status of {', '.join(STATUSES)}; got {trial.status!r}")
    if trial.status != OK and not trial.reason:
        raise refuse(f"is {trial.status}, so it must say why")
    times = (trial.low_ms, trial.median_ms, trial.high_ms)
    if trial.status == OK and not (None not in times and 0 < times[0] <= times[1] <= times[2]):
        raise refuse(f"is ok, so it must have 0 < low_ms <= median_ms <= high_ms; got {times}")
    for target in trial.targets:
        if not isinstance(target, dict) or not {"what", "value", "met"} <= target.keys():
            raise refuse(f"has a target that is not what, value and met; got {target!r}")
    return trial


def lines(trials: Iterable[Trial]) -> list[str]:
    """The trials of one comparison as text."""
    trials = list(trials)
    heading = f"{trials[0].name}: {trials[0].setting}"
    return [heading, *(f"  {trial.provider:<28} {_figures(trial)}" for trial in trials)]


def _figures(trial: Trial) -> str:
    if trial.status != OK:
        return f"{trial.status}: {trial.reason}"
    parts = [f"{trial.median_ms:.4g} ms ({trial.low_ms:.4g} to {trial.high_ms:.4g})"]
    parts += [f"{trial.rate:,.4g} {trial.unit}/s"] if trial.unit else []
    parts += [f"{trial.versus:.3g} x our time"] if trial.versus not in (None, 1.0) else []
    parts += [f"peak {trial.peak_mib:,.1f} MiB"] if trial.peak_mib is not None else []
    parts += [f"loss {trial.loss:.6g}"] if trial.loss is not None else []
    parts += [f"{trial.loss_difference:.1e} apart"] if trial.loss_difference is not None else []
    parts += [f"[{'met' if t['met'] else 'MISSED'}: {t['what']}, is {t['value']:.3g}]" for t in trial.targets]
    return ", ".join(parts)
