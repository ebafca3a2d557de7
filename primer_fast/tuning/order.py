"""What is searched first: the problems of the cases that are furthest below their target."""

from collections.abc import Iterable
from pathlib import Path

from primer_fast.bench import results
from primer_fast.bench.op import FORWARD, OURS
from primer_fast.bench.report import OpRow, Report
from primer_fast.tuning.problems import Decision

_SETTINGS_CHANGE = ("share", "versus", "rate", "median_ms")  # not the host's time, nor memory
Need = dict[tuple[str, str, str, bool], float]  # op, case, precision, backward -> factor


def newest(gpu_name: str, folder: Path = results.FOLDER) -> Report | None:
    """The last report of ops that is committed for a GPU."""
    return next((f.content for f in reversed(results.read(folder).of_gpus()) if f.machine == gpu_name), None)


def needs(report: Report) -> Need:
    """By how much each case of ours is short: the largest factor by which a target is missed.

    A row without a target counts by the fastest of the others, or else by its share. The forward has a part in every
    pass, the backward in those that have one.
    """
    found: Need = {}
    for row in report.rows:
        factor = _short(row) if row.provider == OURS and row.status == "ok" else None
        if factor is not None:
            for backward in (False,) if row.pass_name == FORWARD else (False, True):
                key = row.op, row.case, row.precision, backward
                found[key] = max(factor, found.get(key, 0.0))
    return found


def _short(row: OpRow) -> float | None:
    ratios = [t["ratio"] for t in row.targets if t["what"].split()[0] in _SETTINGS_CHANGE and t.get("ratio")]
    least = min(ratios or row.versus.values() or filter(None, [row.share]), default=None)
    return None if least is None else 1 / least


def need_of(decision: Decision, needs: Need) -> float | None:
    """The factor of the case that a decision comes from; None where nothing is known."""
    unit = decision.unit
    return needs.get((unit.op, unit.case, unit.precision, decision.backward))


def by_need(found: Iterable[Decision], needs: Need) -> list[Decision]:
    """Decisions of the cases that miss their target by the largest factor come first; the others keep their order.

    Within a case, choices marked ``late`` come last.
    """
    place: dict = {}
    for decision in found:
        place.setdefault(decision.unit, len(place))
    return sorted(found, key=lambda s: (-max(need_of(s, needs) or 1.0, 1.0), place[s.unit], s.space.late))
