"""The file that a search writes beside kernels/tuned/<gpu>.json: what became of each problem, and what had no time."""

import json
from pathlib import Path

from primer_fast.bench.files import replace_text
from primer_fast.tuning.order import need_of
from primer_fast.tuning.session import Plan, Row

SCHEMA = "tune 1"


class Record:
    """Rows of problems by name, those of an earlier process first. It is written whole after each."""

    def __init__(self, path: Path, header: dict, resume: bool):
        self.path, self.header = path, header
        self.left_out: list[str] = []
        self.rows: dict[str, dict] = load(path) if resume and path.exists() else {}

    @property
    def marker(self) -> Path:
        """Of the problem at work; see bench.units.each."""
        return self.path.with_suffix(".begun")

    @property
    def failed(self) -> bool:
        """Whether a problem failed, in this process or an earlier one."""
        return any(row["status"].startswith("failed") for row in self.rows.values())

    def add(self, row: Row, todo: Plan) -> None:
        """Write a row that is done."""
        self.rows[str(row.site)] = as_dict(row, todo)
        self.save()

    def close(self, todo: Plan) -> None:
        """Write what was left out."""
        self.left_out = [str(site) for site in todo.sites if str(site) not in self.rows]
        self.save()

    def save(self) -> None:
        content = {"schema": SCHEMA, "header": self.header, "rows": list(self.rows.values()), "left_out": self.left_out}
        replace_text(self.path, json.dumps(content, indent=1, allow_nan=False))


def as_dict(row: Row, todo: Plan) -> dict:
    """``short``: by what factor the case misses its target. ``candidates``: how many were left after each stage."""
    site, outcome = row.site, row.outcome
    return {
        "site": str(site),
        "op": site.unit.op,
        "case": site.unit.case,
        "precision": site.unit.precision,
        "short": need_of(site, todo.needs),
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


def load(path: Path) -> dict[str, dict]:
    """The rows of a file by the names of their problems.

    Raises:
        ValueError: it is not such a file.
    """
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"tune: {path} must be JSON; {error}") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ValueError(f'tune: {path} must have the schema "{SCHEMA}"')
    return {row["site"]: row for row in data["rows"]}
