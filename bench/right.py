"""python -m primer_fast.bench.right --json FILE: is every kernel right on this GPU, at its real sizes?

What only a GPU shows is checked too. Values in bfloat16 come first, then graphs, streams, threads and layouts, then the
other dtypes.
"""

import argparse
import gc
import importlib
import json
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import torch

from primer_fast.bench import environment, sanitized
from primer_fast.bench.files import replace_text
from primer_fast.bench.recorded_step import MODELS, recorded_step
from primer_fast.bench.units import LOST, DeviceLost, each
from primer_fast.proof import native, on_gpu
from primer_fast.proof.native import ATTENTION, Row
from primer_fast.proof.verify import DTYPES, device, ops
from primer_fast.reference.case import Case

SCHEMA = "right 1"
VALUES, LAYOUTS, SECOND, GRAPH = "values", "layouts", "second GPU", "graph"
HEADER_KEYS = ("device", "kind", "date", "torch", "triton", "python", "source")
_ON_USUAL_CASES = (GRAPH, "streams", "threads")
_FIRST = "bfloat16"
_ORDER = (_FIRST, *(name for name in DTYPES if name != _FIRST))
_TRAINING, _ANY = "training step", "any"  # in the place of an op
_PATIENCE = 20.0  # seconds after which a unit counts as hung
_OTHER_SECONDS = 0.4  # assumed: a check that is not of values


class Unit(NamedTuple):
    """One check of one case."""

    check: str
    op: str
    case: Case
    dtype: str

    def __str__(self) -> str:
        return " ".join((self.check, self.op, self.case.name, self.dtype))

    def row(self, reason: str, passed: bool | None = False) -> Row:
        return Row(self.check, self.op, self.case.name, self.dtype, passed=passed, reason=reason)


@dataclass
class Report:
    """What was tried on one machine, and what had no time."""

    header: dict
    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def tried(self) -> set[str]:
        """Names of the units that have rows."""
        return {" ".join((row.check, row.op, row.case, row.dtype)) for row in self.rows}

    def save(self, path: str | Path) -> None:
        """Write JSON; a reader never sees half a file."""
        rows = [row.as_dict() for row in self.rows]
        content = {"schema": SCHEMA, "header": self.header, "rows": rows, "left_out": self.left_out}
        replace_text(path, json.dumps(content, indent=1, allow_nan=False))


def load(path: str | Path) -> Report:
    """Read a report and check it.

    Raises:
        ValueError: not JSON, another schema, a missing header entry, an unknown or missing column, a row that failed
            and does not say why or by how much.
    """
    try:
        data = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"right {path}: must be JSON; {error}") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"right {path}: schema must be {SCHEMA!r}; got {found!r}")
    header, rows, left_out = data.get("header"), data.get("rows"), data.get("left_out")
    if not (isinstance(header, dict) and isinstance(rows, list) and isinstance(left_out, list)):
        raise ValueError(f"right {path}: must have a header, rows and left_out; got {', '.join(data)}")
    if missing := [key for key in HEADER_KEYS if key not in header]:
        raise ValueError(f"right {path}: header must have {', '.join(HEADER_KEYS)}; missing {', '.join(missing)}")
    return Report(header, [_checked(path, number, row) for number, row in enumerate(rows)], left_out)


def _checked(path: str | Path, number: int, data: dict) -> Row:
    def refuse(what: str) -> ValueError:
        return ValueError(f"right {path}: row {number} {what}")

    if not isinstance(data, dict):
        raise refuse(f"must be a set of columns; got {data!r}")
    if unknown := sorted(set(data) - {f.name for f in fields(Row)}):
        raise refuse(f"has unknown columns: {', '.join(unknown)}")
    try:
        row = Row(**data)
    except TypeError as error:
        raise refuse(f"is not a row: {error}") from error
    if row.passed not in (True, False, None):
        raise refuse(f"must have passed true, false or null; got {row.passed!r}")
    figures = row.error is not None and row.budget is not None
    if row.passed is not True and not (row.reason or figures):
        raise refuse("has not passed, so it must say why, or have an error and a budget")
    if row.passed and figures and row.error > row.budget:
        raise refuse(f"has passed, so its error must be within its budget; got {row.error} and {row.budget}")
    return row


def plan(names: Iterable[str] = (), small: bool = False) -> list[Unit]:
    """What there is to try, the most important first; of ``small`` sizes where real ones would take too long.

    Raises:
        ValueError: there is no such op.
    """
    chosen, names = list(names), list(names) or ops()
    if unknown := [name for name in names if name not in ops()]:
        raise ValueError(f"right: op must be one of {', '.join(ops())}; got {', '.join(unknown)}")
    values = {dtype: _values(names, dtype, small) for dtype in _ORDER}
    others = _on_gpu(names, small)
    others += [] if chosen else [Unit(GRAPH, _TRAINING, Case(name, "a model's", {}), _FIRST) for name in MODELS]
    return [*values.pop(_FIRST), *others, *(unit for some in values.values() for unit in some)]


def production_cases(op: str) -> list[Case]:
    """The cases of a GPU's size, in the order in which the reference declares them."""
    return [case for case in importlib.import_module(f"primer_fast.reference.{op}").CASES if case.production]


def _values(names: list[str], dtype: str, small: bool) -> list[Unit]:
    """The first case of every op comes before the second of any."""
    cases = [[on_gpu.usual_case(op, small=True)] if small else production_cases(op) for op in names]
    rounds = zip_longest(*cases)
    return [Unit(VALUES, op, case, dtype) for some in rounds for op, case in zip(names, some, strict=True) if case]


def _on_gpu(names: list[str], small: bool) -> list[Unit]:
    first = [on_gpu.usual_case(op, small=True) if small else production_cases(op)[0] for op in names]
    units = [Unit("bitwise", op, case, _FIRST) for op, case in zip(names, first, strict=True)]
    usual = {op: on_gpu.usual_case(op, small) for op in names}
    units += [Unit(check, op, case, _FIRST) for check in _ON_USUAL_CASES for op, case in usual.items()]
    units += [Unit("one pass", op, case, _FIRST) for op, case in zip(names, first, strict=True) if op == ATTENTION]
    units += _layout_units(names, small)
    if reason := on_gpu.no_second_gpu():
        return [*units, Unit(SECOND, _ANY, Case("any", reason, {}), _FIRST)]
    return units + [Unit(SECOND, op, case, _FIRST) for op, case in usual.items()]


def other_cases() -> list[tuple[str, Case]]:
    """What is launched here and by the sanitizer beside production cases, in bfloat16: to be compiled beforehand."""
    return [*((unit.op, unit.case) for unit in _layout_units(ops(), small=False)), *sanitized.cases()]


def _layout_units(names: list[str], small: bool) -> list[Unit]:
    """Each op in every layout that its arrays can have; if ``small``, in one, of each op another."""
    units = []
    for number, op in enumerate(names):
        cases = on_gpu.layout_cases(op)
        units += [Unit(LAYOUTS, op, case, _FIRST) for case in ([cases[number % len(cases)]] if small else cases)]
    return units


def estimate(units: Iterable[Unit]) -> float:
    """Seconds on an H100, by the operations of the values and an assumed time for all else."""
    of_values = (VALUES, "one pass", LAYOUTS)
    return sum(
        native.seconds(unit.op, unit.case, DTYPES[unit.dtype]) if unit.check in of_values else _OTHER_SECONDS
        for unit in units
    )


def rows_of(unit: Unit, small: bool) -> list[Row]:
    """Try one unit; an error is a row.

    Raises:
        DeviceLost: the GPU takes no more work.
    """
    begin, broken = time.perf_counter(), False
    try:
        if unit.op == _TRAINING:
            rows = recorded_step(unit.case.name, device(), small)
        elif unit.op == _ANY:
            rows = [unit.row(on_gpu.no_second_gpu(), passed=None)]
        else:
            rows = on_gpu.CHECKS[unit.check](unit.op, unit.case, DTYPES[unit.dtype])
    except Exception as error:
        first_line = (str(error).strip().splitlines() or [""])[0][:300]
        rows = [unit.row(f"{type(error).__name__}: {first_line}")]
        broken = True
    if broken:
        gc.collect()  # the error's traceback held tensors
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception as lost:
            raise DeviceLost(rows[0].reason or str(lost).splitlines()[0]) from lost
    for row in rows:
        row.seconds = round((time.perf_counter() - begin) / len(rows), 4)
    return rows


def line(unit: Unit, rows: list[Row]) -> str:
    """What became of a unit: its verdict, and the tensor that came closest to its budget or went furthest past it."""

    def share(row: Row) -> float:
        if row.passed is False:
            return 1e9 if row.error is None or not row.budget else 1 + row.error / row.budget
        return row.error / row.budget if row.error and row.budget else 0.0

    worst = max(rows, key=share)
    verdict = {True: "ok    ", False: "FAILED", None: "none  "}[worst.passed]
    figures = f"{worst.error:.1e} of {worst.budget:.1e}" if worst.error is not None and worst.budget is not None else ""
    seconds = sum(row.seconds for row in rows)
    return f"{verdict} {unit!s:64} {worst.tensor:14} {figures:18} {seconds:6.2f} s  {worst.reason}".rstrip()


def main(argv: list[str] | None = None) -> int:
    """The exit status is 0; 1 if something of ours was wrong, 2 for a wrong call, units.LOST with the GPU."""
    begin = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m primer_fast.bench.right", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="op", help=f"of {', '.join(ops())}; without one, all")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="rewritten after every unit")
    parser.add_argument("--budget", type=float, metavar="S", help="begin nothing that would not end within S seconds")
    parser.add_argument("--small", action="store_true", help="small sizes and one layout of each op")
    parser.add_argument("--resume", action="store_true", help="try what the file lacks")
    args = parser.parse_args(argv)
    try:
        where, units = device(), plan(args.ops, args.small)
    except (RuntimeError, ValueError) as error:
        parser.error(str(error))
    if args.resume and args.json.exists():
        report = load(args.json)
    else:
        report = Report(environment.describe(where))
    print(f"{len(units)} units; on an H100 about {estimate(units):.0f} s", flush=True)

    def record(unit: Unit, rows: list[Row]) -> None:
        report.rows += rows
        report.save(args.json)
        print(line(unit, rows), flush=True)

    status, report.left_out = 0, []
    budget = None if args.budget is None else args.budget - (time.monotonic() - begin)
    try:
        report.left_out = each(
            units, lambda unit: record(unit, rows_of(unit, args.small)),
            lambda unit, reason: record(unit, [unit.row(reason)]),
            done=report.tried(), marker=args.json.with_suffix(".begun"), budget=budget, patience=_PATIENCE,
        )  # fmt: skip
    except DeviceLost as error:
        print(f"right: the GPU was lost: {error}", file=sys.stderr)
        status = LOST
        report.left_out = [str(unit) for unit in units if str(unit) not in report.tried()]
    report.save(args.json)
    failed = sum(row.passed is False for row in report.rows)
    print(f"{len(report.rows)} results, {failed} wrong, {len(report.left_out)} units had no time")
    return status or int(failed > 0)


if __name__ == "__main__":
    if (status := main()) == LOST:
        sys.stdout.flush()
        os._exit(status)  # to take down what is on a lost GPU would end the process with another status
    sys.exit(status)
