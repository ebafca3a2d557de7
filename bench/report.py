"""One benchmark run as data: what was measured, on what, and how it is written, read and checked."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from primer_fast.bench.files import replace_text

SCHEMA = 1
STATUSES = ("ok", "failed", "wrong", "not available")
HEADER_KEYS = ("device", "kind", "measures", "date", "torch", "triton", "python", "ceilings")


@dataclass
class Row:
    """One provider on one case. Figures are None where there is none; ``reason`` says why a row has no figures.

    ``error``: relative Frobenius error against eager PyTorch, the worst of the output and the gradients.
    ``rate`` with ``unit``: TFLOP/s or GB/s, by the ceiling that binds; ``share``: least possible time over the median;
    ``flops`` and ``bytes_moved``: the work that is the op's, of which both come.
    ``peak_mib``: the inputs and all that was allocated during one call. ``versus``: another's time over this one's,
    round by round. ``noise``: how far two timings of the same function were apart in this group, see timing.apart.
    ``targets``: what was asked for here, and whether it is met.
    """

    op: str
    case: str
    precision: str
    pass_name: str
    provider: str
    status: str = "ok"
    reason: str = ""
    median_ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    samples: int = 0
    exposed: bool = False
    host_us: float | None = None
    error: float | None = None
    rate: float | None = None
    unit: str = ""
    share: float | None = None
    flops: float | None = None
    bytes_moved: float | None = None
    peak_mib: float | None = None
    noise: float | None = None
    versus: dict[str, float] = field(default_factory=dict)
    targets: list[dict] = field(default_factory=list)

    @property
    def group(self) -> tuple[str, str, str, str]:
        """The rows that were timed against each other share it."""
        return self.op, self.case, self.precision, self.pass_name

    @property
    def spread(self) -> float | None:
        """Distance of the quartiles as a part of the median."""
        return None if self.median_ms is None else (self.high_ms - self.low_ms) / self.median_ms


def judged(value: float, at_least: float = -math.inf, at_most: float = math.inf) -> dict:
    """A figure beside its bound, as targets stand in the files; a ``ratio`` of 1 and more is met."""
    ratio = value / at_least if math.isfinite(at_least) else at_most / value if value > 0 else 1.0
    return {"value": value, "met": at_least <= value <= at_most, "ratio": ratio}


@dataclass
class Report:
    header: dict
    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def groups(self) -> Iterator[list[Row]]:
        """Rows by group, in the order measured."""
        found: dict[tuple, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.group, []).append(row)
        yield from found.values()

    def save(self, path: str | Path) -> None:
        """Write JSON; a reader never sees half a file."""
        replace_text(path, json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1, allow_nan=False))


def load(path: str | Path) -> Report:
    """``parse`` of a file, with its errors; a file that is not JSON is a ValueError too."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"bench report {path}: must be JSON; {error}") from error
    return parse(data, path)


def parse(data: dict, path: str | Path) -> Report:
    """A report from what was read as JSON.

    Raises:
        ValueError: another schema, a missing header entry, an unknown or missing column, a figure that cannot be (a
            median that is not positive, a row "ok" without one).
    """
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"bench report {path}: schema must be {SCHEMA}; got {found}")
    if not (isinstance(data.get("header"), dict) and isinstance(data.get("rows"), list)):
        raise ValueError(f"bench report {path}: must have a header and rows; got {', '.join(data)}")
    if missing := [key for key in HEADER_KEYS if key not in data["header"]]:
        raise ValueError(
            f"bench report {path}: header must have {', '.join(HEADER_KEYS)}; missing {', '.join(missing)}"
        )
    rows = [_checked_row(path, number, row) for number, row in enumerate(data["rows"])]
    return Report(data["header"], rows, data.get("left_out", []))


def _checked_row(path: str | Path, number: int, data: dict) -> Row:
    def refuse(what: str) -> ValueError:
        return ValueError(f"bench report {path}: row {number} {what}")

    known = {f.name for f in fields(Row)}
    if unknown := sorted(set(data) - known):
        raise refuse(f"has unknown columns: {', '.join(unknown)}")
    try:
        row = Row(**data)
    except TypeError as error:
        raise refuse(f"is not a row: {error}") from error
    if row.status not in STATUSES:
        raise refuse(f"must have a status of {', '.join(STATUSES)}; got {row.status!r}")
    if row.status == "ok":
        figures = (row.low_ms, row.median_ms, row.high_ms)
        if any(not isinstance(figure, int | float) for figure in figures):
            raise refuse("is ok, so it must have low_ms, median_ms and high_ms")
        if not 0 < row.low_ms <= row.median_ms <= row.high_ms:
            raise refuse(f"must have 0 < low_ms <= median_ms <= high_ms; got {figures}")
    elif not row.reason:
        raise refuse(f"is {row.status}, so it must say why")
    return row
