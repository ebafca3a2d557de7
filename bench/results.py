"""What is committed under bench/results/<machine>/: times of ops and of whole programs, checks, compiled code.

fast.json of `make gpu`, and of `python -m primer_fast.bench`                         see report.py
programs.json of `make gpu`, and of `python -m primer_fast.bench.models`              see report.py
right.json, compile.json, sanitizer.json of `make gpu`; tune.json of `make gpu-tune`  see report.py
`primer-fast verify --json`                                                           verified rows
`primer-fast kernels --json bench/results/offline/sm_90.json`                         what the kernels compile to

`make keep` puts what a GPU run left in place: <gpu>/<date>-<time>-<stage>.json.
bench/results/reasons.json says why a target is missed: {subject: {target: reason}}.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from primer_fast.bench.report import FAST, PROGRAMS, Report, kind_of, parse

FOLDER = Path(__file__).parent / "results"
REASONS = "reasons.json"


class Found(NamedTuple):
    """One file of a machine's folder: the path under bench/results, and what it holds."""

    path: str
    machine: str
    content: Report


@dataclass(frozen=True)
class Results:
    """Everything, the oldest first.

    ``compiled``: by file, rows of proof/production.py with the versions beside them; ``unreadable``: by file, why;
    ``reasons``: by subject and target.
    """

    reports: list[Found] = field(default_factory=list)
    verified: dict[str, list[dict]] = field(default_factory=dict)
    compiled: dict[str, dict] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, dict[str, str]] = field(default_factory=dict)

    def of_kind(self, *kinds: str) -> list[Found]:
        """The reports of some of report.KINDS."""
        return [found for found in self.reports if found.content.kind in kinds]

    @property
    def ops(self) -> list[Found]:
        return self.of_kind(FAST)

    @property
    def programs(self) -> list[Found]:
        return self.of_kind(PROGRAMS)

    def of_gpus(self) -> list[Found]:
        """Reports of ops, not of whole programs."""
        return [found for found in self.ops if found.content.header["kind"] == "cuda"]

    def newest(self, kind: str) -> list[Found]:
        """The last report of a kind on each machine."""
        return list({found.machine: found for found in self.of_kind(kind)}.values())


def read(folder: Path = FOLDER) -> Results:
    """All files of ``folder``/*/*.json; one that cannot be read is named with the reason, never fatal."""
    results = Results()
    for path in sorted(folder.glob("*/*.json")):
        name, machine = path.relative_to(folder).as_posix(), path.parent.name
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if kind_of(data) is not None:
                results.reports.append(Found(name, machine, parse(data, path)))
            elif isinstance(data, dict) and {"triton", "torch", "rows"} <= data.keys():
                results.compiled[name] = _checked(data, {"op", "case", "dtype", "target", "kernel", "resources"})
            elif isinstance(data, list):
                results.verified[name] = _checked({"rows": data}, {"op", "case", "dtype", "passed"})["rows"]
            else:
                raise ValueError("is none of the files that belong here")
        except (OSError, ValueError) as error:
            results.unreadable[name] = str(error)
    if (path := folder / REASONS).exists():
        try:
            results.reasons.update(_checked_reasons(json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError) as error:
            results.unreadable[REASONS] = str(error)
    results.reports.sort(key=lambda found: found.content.header["date"])
    return results


def _checked_reasons(data) -> dict[str, dict[str, str]]:
    if not isinstance(data, dict) or not all(
        isinstance(of, dict) and all(isinstance(why, str) for why in of.values()) for of in data.values()
    ):
        raise ValueError(f"must be {{subject: {{target: reason}}}}; got {data!r}")
    return data


def _checked(data: dict, keys: set[str]) -> dict:
    for number, row in enumerate(data["rows"]):
        if not isinstance(row, dict) or (missing := keys - row.keys()):
            raise ValueError(f"row {number} must have {', '.join(sorted(missing if isinstance(row, dict) else keys))}")
    return data
