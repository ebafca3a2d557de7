"""How the figures of one machine moved from run to run."""

from statistics import geometric_mean
from typing import NamedTuple

from primer_fast.bench.report import Report
from primer_fast.bench.tables import ours


class Change(NamedTuple):
    """Our time on one case in the last two runs; ``noise``: what the later run measured of its own noise."""

    group: tuple[str, str, str, str]
    before_ms: float
    after_ms: float
    noise: float

    @property
    def ratio(self) -> float:
        return self.after_ms / self.before_ms


def relative_times(reports: list[Report]) -> dict[str, list[tuple[str, float]]]:
    """By op, each run's date and our time over that of the op's first run: the geometric mean over the same cases."""
    series: dict[str, list[tuple[str, float]]] = {}
    first: dict[str, dict[tuple, float]] = {}
    for report in reports:
        medians: dict[str, dict[tuple, float]] = {}
        for row in ours(report):
            if row.status == "ok":
                medians.setdefault(row.op, {})[row.group] = row.median_ms
        for op, groups in medians.items():
            start = first.setdefault(op, groups)
            common = [groups[group] / start[group] for group in groups.keys() & start.keys()]
            if common:
                series.setdefault(op, []).append((report.header["date"], geometric_mean(common)))
    return series


def changes(reports: list[Report]) -> list[Change]:
    """Of the last two of ``reports``, oldest first; the worst first."""
    if len(reports) < 2:
        return []
    before, after = ({row.group: row for row in ours(report) if row.status == "ok"} for report in reports[-2:])
    found = [
        Change(group, before[group].median_ms, row.median_ms, row.noise or 0.0)
        for group, row in after.items()
        if group in before
    ]
    return sorted(found, key=lambda change: -change.ratio)


def ratios(reports: list[Report]) -> dict[tuple[str, str, str], list[tuple[str, float]]]:
    """Of whole programs: by comparison and provider, each run's date and the provider's time over ours."""
    series: dict[tuple[str, str, str], list[tuple[str, float]]] = {}
    for report in reports:
        for row in report.rows:
            if row.versus is not None:
                series.setdefault((*row.group, row.provider), []).append((report.header["date"], row.versus))
    return series
