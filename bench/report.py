"""The files that measurements leave: what each kind of them holds, how it is written, read and checked.

A file is JSON, {"schema": ..., "header": ..., "rows": [...], "left_out": [names]}: one row for each thing that was
measured or checked, and the names of those for which there was no time. The header says on which machine, with which
versions and when; see environment.describe.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from primer_fast.bench.files import replace_text
from primer_fast.bench.timing import Timing, quartiles

OURS = "primer_fast"  # the provider that all others are compared with
KINDS = COMPILE, RIGHT, FAST, PROGRAMS, SANITIZER, TUNE = (
    "compile", "right", "fast", "programs", "sanitizer", "tune"
)  # fmt: skip
OK, FAILED, WRONG, NOT_AVAILABLE = "ok", "failed", "wrong", "not available"
STATUSES = (OK, FAILED, WRONG, NOT_AVAILABLE)  # of a provider
PASSED, ERRORS, STOPPED = "passed", "errors", "stopped"
TOOL_STATUSES = (PASSED, ERRORS, STOPPED, FAILED, NOT_AVAILABLE)  # of a row of SANITIZER


@dataclass(frozen=True)
class Goal:
    """A bound on one figure of a comparison; the text of ``what`` says it in words."""

    what: str
    at_least: float = -math.inf
    at_most: float = math.inf

    def judged(self, value: float) -> dict:
        """The figure beside its bound, as targets stand in the files; a ``ratio`` of 1 and more is met."""
        ratio = value / self.at_least if math.isfinite(self.at_least) else self.at_most / value if value > 0 else 1.0
        return {"what": self.what, "value": value, "met": self.at_least <= value <= self.at_most, "ratio": ratio}


@dataclass(kw_only=True)
class ProviderRow:
    """One provider in one comparison. Figures are None where there is none; ``reason`` says why a row has no figures.

    ``rate``: ``unit`` per second by the median. ``targets``: what was asked for here, and whether it is met.
    """

    status: str = OK
    reason: str = ""
    median_ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    samples: int = 0
    rate: float | None = None
    unit: str = ""
    peak_mib: float | None = None
    targets: list[dict] = field(default_factory=list)


@dataclass
class OpRow(ProviderRow):
    """One provider on one case of an op.

    ``error``: relative Frobenius error against eager PyTorch, the worst of the output and the gradients.
    ``rate`` with ``unit``: TFLOP/s or GB/s, by the ceiling that binds; ``share``: least possible time over the median;
    ``flops`` and ``bytes_moved``: the work that is the op's, of which both come.
    ``peak_mib``: the inputs and all that was allocated during one call. ``versus``: another's time over this one's,
    round by round. ``noise``: how far two timings of the same function were apart in this group, see timing.apart.
    ``exposed``: whether the device waited for the host.
    """

    op: str
    case: str
    precision: str
    pass_name: str
    provider: str
    exposed: bool = False
    host_us: float | None = None
    error: float | None = None
    share: float | None = None
    flops: float | None = None
    bytes_moved: float | None = None
    noise: float | None = None
    versus: dict[str, float] = field(default_factory=dict)

    @property
    def group(self) -> tuple[str, str, str, str]:
        """The rows that were timed against each other share it."""
        return self.op, self.case, self.precision, self.pass_name

    @property
    def subject(self) -> str:
        """What targets are declared for."""
        return self.op

    @property
    def which(self) -> str:
        """Which of the subject's cases it is."""
        return f"{self.case}, {self.precision}, {self.pass_name}"

    @property
    def spread(self) -> float | None:
        """Distance of the quartiles as a part of the median."""
        return None if self.median_ms is None else (self.high_ms - self.low_ms) / self.median_ms


@dataclass
class ProgramRow(ProviderRow):
    """One provider of a whole program: a training step, a generated text, a loss.

    ``versus``: its time over ours, the median of the rounds' own ratios; ``versus_low`` and ``versus_high`` are their
    quartiles. ``peak_mib``: the most memory of one run beyond what was there before. ``loss``: the last one;
    ``loss_difference``: the largest distance from ours over all steps.
    """

    name: str
    setting: str
    provider: str
    versus: float | None = None
    versus_low: float | None = None
    versus_high: float | None = None
    loss: float | None = None
    loss_difference: float | None = None

    @property
    def group(self) -> tuple[str, str]:
        """The rows that were timed against each other share it."""
        return self.name, self.setting

    @property
    def subject(self) -> str:
        """What targets are declared for: "call of linear" is one of the calls."""
        first, of, _ = self.name.partition(" of ")
        return first if of and first in ("call", "launch") else self.name

    @property
    def which(self) -> str:
        """Which of the subject's cases it is."""
        return self.setting if self.subject == self.name else self.name

    def time_as(self, timing: Timing | Exception, ours: Timing | Exception, work: float) -> None:
        """``time`` of what ``timing.time_interleaved`` found, which is raised where it is an exception."""
        for found in (timing, ours):
            if isinstance(found, Exception):
                raise found
        self.time([ms / 1e3 for ms in timing.samples], [ms / 1e3 for ms in ours.samples], work)

    def time(self, seconds: Sequence[float], ours: Sequence[float], work: float) -> None:
        """Fill in the figures of ``seconds`` per run beside those of ours, run by run; a run is ``work`` units."""
        self.low_ms, self.median_ms, self.high_ms = (1e3 * s for s in quartiles(seconds))
        self.samples, self.rate = len(seconds), work / self.median_ms * 1e3
        ratios = [theirs / own for theirs, own in zip(seconds, ours, strict=True)]
        self.versus_low, self.versus, self.versus_high = quartiles(ratios)


def _provider_contradiction(row: ProviderRow) -> str:
    times = (row.low_ms, row.median_ms, row.high_ms)
    if row.status not in STATUSES:
        return f"status must be one of {', '.join(STATUSES)}; got {row.status!r}"
    if row.status == OK and not (None not in times and 0 < times[0] <= times[1] <= times[2]):
        return f"it is ok, so it must have 0 < low_ms <= median_ms <= high_ms; got {times}"
    if row.status != OK and not row.reason:
        return f"it is {row.status}, so it must say why"
    for target in row.targets:
        if not isinstance(target, dict) or not {"what", "value", "met"} <= target.keys():
            return f"a target must have what, value and met; got {target!r}"
    return ""


def _check_contradiction(row: dict) -> str:
    error, budget, passed = row["error"], row["budget"], row["passed"]
    if passed not in (True, False, None):
        return f"passed must be true, false or null; got {passed!r}"
    if passed and None not in (error, budget) and not error <= budget:
        return f"it has passed, so its error must be within its budget; got {error} and {budget}"
    return ""


def _tool_contradiction(row: dict) -> str:
    status, errors = row["status"], row["errors"]
    if status not in TOOL_STATUSES:
        return f"status must be one of {', '.join(TOOL_STATUSES)}; got {status!r}"
    if (status == PASSED and errors != 0) or (status == ERRORS and not errors):
        return f"it is {status!r}, which does not go with errors {errors!r}"
    return ""


_MACHINE = ("device", "kind", "date", "torch", "python")
_STAGE = (*_MACHINE, "triton", "source")


@dataclass(frozen=True)
class Schema:
    """What a file of one kind must hold."""

    name: str | int
    header: Iterable[str]
    columns: frozenset[str] = frozenset()  # that every row must have
    figures: frozenset[str] = frozenset()  # columns that hold a number or null
    row: Callable[..., Any] | None = None  # a dataclass of the rows; None: they stay dictionaries
    contradiction: Callable[[Any], str] = lambda row: ""  # what cannot be in a row that has all its columns
    beside: frozenset[str] = frozenset()  # numbers beside the rows
    rows: str = "rows"  # the name under which the rows stand


def _of_class(name: str | int, header: Iterable[str], row: type, **more) -> Schema:
    """The schema of rows that are made into a dataclass, whose fields say what the columns are."""
    columns = frozenset(f.name for f in fields(row) if f.default is f.default_factory is MISSING)
    figures = frozenset(f.name for f in fields(row) if f.type == float | None)
    return Schema(name, header, columns, figures, row, _provider_contradiction, **more)


SCHEMAS = {
    FAST: _of_class(1, (*_MACHINE, "measures", "triton", "ceilings"), OpRow),
    PROGRAMS: _of_class("trials 1", (*_MACHINE, "command", "load_before"), ProgramRow, rows="trials"),
    RIGHT: Schema(
        "right 1", _STAGE, frozenset({"check", "op", "case", "dtype", "tensor", "error", "budget", "passed"}),
        frozenset({"error", "budget"}), contradiction=_check_contradiction,
    ),
    COMPILE: Schema("compiled 1", _STAGE, frozenset({"what", "errors"}), beside=frozenset({"launches", "seconds"})),
    SANITIZER: Schema(
        "sanitizer 1", _STAGE, frozenset({"tool", "status", "errors", "lines"}), frozenset({"errors"}),
        contradiction=_tool_contradiction,
    ),
    TUNE: Schema(
        "tune 1", _STAGE, frozenset({"site", "op", "status"}), frozenset({"seconds", "default_seconds"})
    ),
}  # fmt: skip


@dataclass
class Report:
    """One file. ``beside``: numbers of the whole, by name."""

    kind: str  # one of KINDS
    header: dict
    rows: list = field(default_factory=list)  # of OpRow, of ProgramRow, or dictionaries: see SCHEMAS
    left_out: list[str] = field(default_factory=list)
    beside: dict[str, float] = field(default_factory=dict)

    def groups(self) -> list[list]:
        """The rows that were timed against each other, in the order measured."""
        found: dict[tuple, list] = {}
        for row in self.rows:
            found.setdefault(row.group, []).append(row)
        return list(found.values())

    def save(self, path: str | Path) -> None:
        """Write JSON; a reader never sees half a file."""
        schema = SCHEMAS[self.kind]
        rows = self.rows if schema.row is None else [asdict(row) for row in self.rows]
        content = {"schema": schema.name, "header": self.header, **self.beside, schema.rows: rows}
        replace_text(path, json.dumps(content | {"left_out": self.left_out}, indent=1, allow_nan=False))


def kind_of(data: object) -> str | None:
    """Which of KINDS something read as JSON is; None if it is none of them."""
    asked = data.get("schema") if isinstance(data, dict) else None
    return next((kind for kind, schema in SCHEMAS.items() if schema.name == asked), None)


def load(path: str | Path, kind: str | None = None) -> Report:
    """``parse`` of a file, with its errors; a file that is not JSON is a ValueError too."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: must be JSON; {error}") from error
    return parse(data, path, kind)


def parse(data: dict, where: str | Path, kind: str | None = None) -> Report:
    """A report from what was read as JSON.

    Raises:
        ValueError: no schema of ``kind``, or of any kind where that is None; no header, or one without an entry; no
            rows, or one that lacks a column, has an unknown one or contradicts itself.
    """
    found = kind_of(data)
    if found is None or kind not in (None, found):
        asked = data.get("schema") if isinstance(data, dict) else type(data).__name__
        names = [repr(schema.name) for of, schema in SCHEMAS.items() if kind in (None, of)]
        raise ValueError(f"{where}: schema must be {'one of ' * (kind is None)}{', '.join(names)}; got {asked!r}")
    schema = SCHEMAS[found]
    header, rows, left_out = data.get("header"), data.get(schema.rows), data.get("left_out", [])
    if not (isinstance(header, dict) and isinstance(rows, list)):
        raise ValueError(f"{where}: must have a header and {schema.rows}; got {', '.join(data)}")
    if missing := [key for key in schema.header if key not in header]:
        raise ValueError(f"{where}: header must have {', '.join(schema.header)}; missing {', '.join(missing)}")
    if not (isinstance(left_out, list) and all(isinstance(name, str) for name in left_out)):
        raise ValueError(f"{where}: left_out must be names; got {left_out!r}")
    beside = {name: data.get(name) for name in sorted(schema.beside)}
    if wrong := [name for name, value in beside.items() if not isinstance(value, int | float)]:
        raise ValueError(f"{where}: must have the numbers {', '.join(beside)}; got none for {', '.join(wrong)}")
    made = [_checked(schema, row, f"{where}: row {number}") for number, row in enumerate(rows)]
    return Report(found, header, made, left_out, beside)


def _checked(schema: Schema, data: dict, where: str) -> Any:
    if not isinstance(data, dict) or not schema.columns <= data.keys():
        missing = sorted(schema.columns - data.keys()) if isinstance(data, dict) else [repr(data)]
        raise ValueError(f"{where} must have {', '.join(sorted(schema.columns))}; missing {', '.join(missing)}")
    if schema.row is not None and (unknown := sorted(data.keys() - {f.name for f in fields(schema.row)})):
        raise ValueError(f"{where} has unknown columns: {', '.join(unknown)}")
    if strange := [key for key in sorted(schema.figures) if not isinstance(data.get(key), int | float | None)]:
        raise ValueError(f"{where}: {strange[0]} must be a number or null; got {data[strange[0]]!r}")
    row = data if schema.row is None else schema.row(**data)
    if wrong := schema.contradiction(row):
        raise ValueError(f"{where}: {wrong}")
    return row
