"""A folder that `make gpu` or `make gpu-tune` wrote: its files, and whether they are to be trusted."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from primer_fast.bench import environment
from primer_fast.bench.op import OURS
from primer_fast.bench.report import COMPILE, FAILED, FAST, KINDS, PROGRAMS, SCHEMAS, TUNE, WRONG, Report, parse
from primer_fast.bench.stages import stages
from primer_fast.kernels.device import file_name
from primer_fast.kernels.tunable import FIGURES, read_tuned

HEADER = ("device", "details", "driver", "python", "torch", "triton", "source")  # equal in all files of a folder


class Refused(ValueError):
    """A folder is not kept; ``reasons``: why, a line each."""

    def __init__(self, reasons: Iterable[str]):
        self.reasons = list(dict.fromkeys(reasons))
        super().__init__("\n".join(self.reasons))


@dataclass
class GpuFolder:
    """What a folder holds: the contents of the stages' files by stage, those of the tuned files by name."""

    stages: dict[str, dict] = field(default_factory=dict)
    tuned: dict[str, dict] = field(default_factory=dict)

    @property
    def headers(self) -> dict[str, dict]:
        return {f"{kind}.json": data["header"] for kind, data in self.stages.items()}

    @property
    def header(self) -> dict:
        """What is equal in all of them once they are checked."""
        return next(iter(self.headers.values()))

    def rows(self, *kinds: str) -> list[dict]:
        """Of some of the stages, as they stand in the files."""
        return [row for kind in kinds if kind in self.stages for row in self.stages[kind][SCHEMAS[kind].rows]]


def read(folder: Path) -> GpuFolder:
    """The files of a folder, their forms checked; logs and summaries are none of them.

    Raises:
        Refused: there is none, or one of another form.
    """
    found, reasons = GpuFolder(), []
    for path in sorted([*folder.glob("*.json"), *folder.glob("tuned/*.json")]):
        name = path.relative_to(folder).as_posix()
        try:
            if path.parent == folder and path.stem in KINDS:
                found.stages[path.stem] = _checked_stage(path.stem, json.loads(path.read_text(encoding="utf-8")))
            else:
                found.tuned[name] = _checked_tuned(read_tuned(path))
        except (OSError, ValueError, TypeError) as error:
            reasons.append(f"{name}: {error}")
    if not (found.stages or reasons):
        reasons = [f"{folder}: must hold one of {', '.join(f'{kind}.json' for kind in KINDS)}; it holds none"]
    if reasons:
        raise Refused(reasons)
    return found


def _checked_stage(kind: str, data: dict) -> dict:
    made = parse(data, "its content", kind)
    if missing := [key for key in HEADER if key not in made.header]:
        raise ValueError(f"its header must have {', '.join(HEADER)}; missing {', '.join(missing)}")
    datetime.fromisoformat(made.header["date"])
    if not re.fullmatch(r"\w[\w.+()-]*", gpu_of(made.header)):
        raise ValueError(f"its device must be fit to name a folder; got {made.header['device']!r}")
    return data


def _checked_tuned(content: dict) -> dict:
    for choice, section in content["settings"].items():
        for bucket, entry in section.items():
            if not re.fullmatch(r"\d+(x\d+)*( \w+)*", bucket):
                raise ValueError(f"{choice} must have buckets of sizes and flags; got {bucket!r}")
            figures = [entry.get(key) for key in FIGURES] if isinstance(entry, dict) else [None]
            if not all(isinstance(figure, int | float) and figure > 0 for figure in figures):
                raise ValueError(f"{choice} {bucket} must have {', '.join(FIGURES)}, positive; got {entry}")
    return content


def gpu_of(header: dict) -> str:
    """The name of a GPU's files."""
    return file_name(str(header["device"]))


def elsewhere(found: GpuFolder) -> list[str]:
    """Why the files are not those of one GPU and of this checkout's code."""
    reasons, first = [], next(iter(found.headers))
    for name, header in found.headers.items():
        if header["device"] == environment.STAND_IN:
            reasons.append(f"{name}: it is of a rehearsal, on a stand-in for a GPU")
        elif header["kind"] != "cuda":
            reasons.append(f"{name}: it is of no GPU, but of {header['device']}")
        if header.get("small"):
            reasons.append(f"{name}: it was made with --small, at sizes whose times say nothing")
        if apart := [key for key in HEADER if header[key] != found.header[key]]:
            differences = "; ".join(f"{key} {header[key]!r}, not {found.header[key]!r}" for key in apart)
            reasons.append(f"{name} and {first}: they must be of one machine and one source; {differences}")
    here = environment.source()
    if others := sorted({str(header["source"]) for header in found.headers.values()} - {here}):
        reasons.append(
            f"the source measured is {', '.join(others)}, and that of this checkout is {here}; which files differ is"
            " not known: check out the commit that was measured and keep them there"
        )
    gpu = gpu_of(found.header)
    return reasons + [f"{name}: it must be of {gpu}, as {first} is" for name in found.tuned if Path(name).stem != gpu]


def not_right(found: GpuFolder, right: Report) -> dict[str, str]:
    """By name, what is not known to be right and why: an op, a program, or what else right.json tries."""
    wrong: dict[str, str] = {}
    failed: dict[str, list[dict]] = {}
    for row in filter(stages.wrong, right.rows):
        failed.setdefault(row["op"] or row["check"], []).append(row)
    for name, rows in failed.items():
        wrong[name] = stages.line(rows[0]) + (f", and {len(rows) - 1} more" if len(rows) > 1 else "")
    for row in found.rows(COMPILE):
        if row["errors"]:
            wrong.setdefault(row["what"].partition(" ")[0], f"{row['what']}: {row['errors'][0]}")
    for row in filter(stages.failed, found.rows(TUNE)):
        wrong.setdefault(row["op"], f"{row['site']}: {row['status']}")
    for kind, name in ((FAST, "op"), (PROGRAMS, "name")):
        for row in found.rows(kind):
            if row["provider"].startswith(OURS) and row["status"] in (FAILED, WRONG):
                wrong.setdefault(row[name], f"{row['status']} in {kind}.json: {row['reason']}")
    tried = {row["op"] for row in right.rows if row["passed"]}
    timed = dict.fromkeys(row["op"] for row in found.rows(FAST, TUNE))
    return wrong | {op: "right.json does not try it" for op in timed if op not in tried and op not in wrong}
