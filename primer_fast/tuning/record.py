"""The file that a search writes beside kernels/tuned/<gpu>.json: what became of each problem, and what had no time."""

from pathlib import Path

from primer_fast.bench import units
from primer_fast.bench.report import TUNE, Report
from primer_fast.tuning.order import need_of
from primer_fast.tuning.session import DecisionResult, SearchPlan


class Record:
    """Rows of problems by name, those of an earlier process first. It is written whole after each."""

    def __init__(self, path: Path, header: dict, resume: bool):
        self.path, self.header = path, header
        self.left_out: list[str] = []
        before = units.resumed(path, TUNE, header) if resume else None
        self.rows: dict[str, dict] = {row["site"]: row for row in before.rows} if before else {}

    @property
    def marker(self) -> Path:
        """Of the problem at work; see bench.units.each."""
        return units.marker_of(self.path)

    @property
    def failed(self) -> bool:
        """Whether a problem failed, in this process or an earlier one."""
        return any(row["status"].startswith("failed") for row in self.rows.values())

    def add(self, row: DecisionResult, todo: SearchPlan) -> None:
        """Write a row that is done."""
        self.rows[str(row.decision)] = as_dict(row, todo)
        self.save()

    def close(self, todo: SearchPlan) -> None:
        """Write what was left out."""
        self.left_out = [str(decision) for decision in todo.decisions if str(decision) not in self.rows]
        self.save()

    def save(self) -> None:
        Report(TUNE, self.header, list(self.rows.values()), self.left_out).save(self.path)


def as_dict(row: DecisionResult, todo: SearchPlan) -> dict:
    """``short``: by what factor the case misses its target. ``candidates``: how many were left after each stage."""
    decision, outcome = row.decision, row.outcome
    return {
        "site": str(decision),
        "op": decision.unit.op,
        "case": decision.unit.case,
        "precision": decision.unit.precision,
        "short": need_of(decision, todo.needs),
        "status": row.status,
        "default": None if row.default is None else row.default._asdict(),
        "winner": None if outcome is None else outcome.settings._asdict(),
        "seconds": None if outcome is None else outcome.seconds,
        "default_seconds": None if outcome is None else outcome.default_seconds,
        "noise": None if outcome is None else outcome.noise,
        "candidates": {
            "all": row.candidates, "fit": row.legal, "by estimate": row.estimated, "by compile": row.compiled,
            "timed": None if outcome is None else outcome.timed,
        },
        "refused": [] if outcome is None else list(outcome.refused),
        "compile_seconds": row.compile_seconds,
    }  # fmt: skip
