"""python -m primer_fast.bench.stages.right --json FILE: is every kernel right on this GPU, at its real sizes?

What only a GPU shows is checked too. Values in bfloat16 come first, then graphs, streams, threads and layouts, then the
other dtypes.
"""

import argparse
import gc
import time
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from primer_fast.bench import environment
from primer_fast.bench.op import production
from primer_fast.bench.programs.recorded_step import MODELS, recorded_step
from primer_fast.bench.report import RIGHT, Report
from primer_fast.bench.stages import sanitized, stages
from primer_fast.bench.units import FOREVER, LOST, check_device, fill, leave, one_line, resumed
from primer_fast.proof import native, on_gpu
from primer_fast.proof.native import ATTENTION, CheckedTensor
from primer_fast.proof.verify import DTYPES, device, ops
from primer_fast.reference.case import Case
from primer_fast.reference.ops import OPS

VALUES, LAYOUTS, SECOND, GRAPH = "values", "layouts", "second GPU", "graph"
_ON_USUAL_CASES = (GRAPH, "streams", "threads")
_FIRST = "bfloat16"
ORDER = (_FIRST, *(name for name in DTYPES if name != _FIRST))  # of dtypes, where time is short
_TRAINING, _ANY = "training step", "any"  # in the place of an op
_PATIENCE = 20.0  # seconds after which a unit counts as hung
_OTHER_SECONDS = 0.4  # assumed: a check that is not of values


class Check(NamedTuple):
    """One check of one case."""

    check: str
    op: str
    case: Case
    dtype: str

    def __str__(self) -> str:
        return " ".join((self.check, self.op, self.case.name, self.dtype))

    def row(self, reason: str, passed: bool | None = False) -> CheckedTensor:
        return CheckedTensor(self.check, self.op, self.case.name, self.dtype, passed=passed, reason=reason)


def tried(rows: Iterable[dict]) -> set[str]:
    """Names of the units that have rows."""
    return {" ".join((row["check"], row["op"], row["case"], row["dtype"])) for row in rows}


def checks(names: Iterable[str] = (), small: bool = False) -> list[Check]:
    """What there is to try, the most important first; of ``small`` sizes where real ones would take too long.

    Raises:
        ValueError: there is no such op.
    """
    chosen, names = list(names), list(names) or ops()
    if unknown := [name for name in names if name not in ops()]:
        raise ValueError(f"right: op must be one of {', '.join(ops())}; got {', '.join(unknown)}")
    values = {dtype: _values(names, dtype, small) for dtype in ORDER}
    others = _on_gpu(names, small)
    models = (
        [] if chosen else list(MODELS)[:: 3 if small else 1]
    )  # the first and the last: the others have no kernel more
    others += [Check(GRAPH, _TRAINING, Case(name, "a model's", {}), _FIRST) for name in models]
    return [*values.pop(_FIRST), *others, *(unit for some in values.values() for unit in some)]


def _values(names: list[str], dtype: str, small: bool) -> list[Check]:
    """The first case of every op comes before the second of any."""
    cases = [[on_gpu.usual_case(op, small=True)] if small else production(OPS[op].cases) for op in names]
    rounds = zip_longest(*cases)
    return [Check(VALUES, op, case, dtype) for some in rounds for op, case in zip(names, some, strict=True) if case]


def _on_gpu(names: list[str], small: bool) -> list[Check]:
    first = [on_gpu.usual_case(op, small=True) if small else production(OPS[op].cases)[0] for op in names]
    units = [Check("bitwise", op, case, _FIRST) for op, case in zip(names, first, strict=True)]
    usual = {op: on_gpu.usual_case(op, small) for op in names}
    units += [Check(check, op, case, _FIRST) for check in _ON_USUAL_CASES for op, case in usual.items()]
    units += [Check("one pass", op, case, _FIRST) for op, case in zip(names, first, strict=True) if op == ATTENTION]
    units += _layout_units(names, small)
    if reason := on_gpu.no_second_gpu():
        return [*units, Check(SECOND, _ANY, Case("any", reason, {}), _FIRST)]
    return units + [Check(SECOND, op, case, _FIRST) for op, case in usual.items()]


def other_cases() -> list[tuple[str, Case]]:
    """What is launched here and by the sanitizer beside production cases, in bfloat16: to be compiled beforehand."""
    return [*((unit.op, unit.case) for unit in _layout_units(ops(), small=False)), *sanitized.cases()]


def _layout_units(names: list[str], small: bool) -> list[Check]:
    """Each op in every layout that its arrays can have; if ``small``, in one, of each op another."""
    units = []
    for number, op in enumerate(names):
        cases = on_gpu.layout_cases(op)
        units += [Check(LAYOUTS, op, case, _FIRST) for case in ([cases[number % len(cases)]] if small else cases)]
    return units


def estimate(units: Iterable[Check]) -> float:
    """Seconds on an H100, by the operations of the values and an assumed time for all else."""
    of_values = (VALUES, "one pass", LAYOUTS)
    return sum(
        native.seconds(unit.op, unit.case, DTYPES[unit.dtype]) if unit.check in of_values else _OTHER_SECONDS
        for unit in units
    )


def rows_of(unit: Check, small: bool) -> list[dict]:
    """Try one unit; an error is a row.

    Raises:
        DeviceLost: the GPU takes no more work.
    """
    begin, error = time.perf_counter(), None
    try:
        if unit.op == _TRAINING:
            rows = recorded_step(unit.case.name, device(), small)
        elif unit.op == _ANY:
            rows = [unit.row(on_gpu.no_second_gpu(), passed=None)]
        else:
            rows = on_gpu.CHECKS[unit.check](unit.op, unit.case, DTYPES[unit.dtype])
    except Exception as raised:
        error = one_line(raised)
        rows = [unit.row(error)]
    if error:
        gc.collect()  # the error's traceback held tensors
    check_device(error)
    for row in rows:
        row.seconds = round((time.perf_counter() - begin) / len(rows), 4)
    return [row.as_dict() for row in rows]


def line(unit: Check, rows: list[dict]) -> str:
    """What became of a unit: its verdict, and the tensor that came closest to its budget or went furthest past it."""

    def share(row: dict) -> float:
        part = row["error"] / row["budget"] if row["error"] and row["budget"] else 0.0
        return part if row["passed"] is not False else 1 + (part or 1e9)

    worst = max(rows, key=share)
    verdict = {True: "ok    ", False: "FAILED", None: "none  "}[worst["passed"]]
    figures = "" if None in (worst["error"], worst["budget"]) else f"{worst['error']:.1e} of {worst['budget']:.1e}"
    seconds = sum(row["seconds"] for row in rows)
    return f"{verdict} {unit!s:64} {worst['tensor']:14} {figures:18} {seconds:6.2f} s  {worst['reason']}".rstrip()


def main(argv: list[str] | None = None) -> int:
    """The exit status is 0; 1 if something of ours was wrong, 2 for a wrong call, units.LOST with the GPU."""
    begin = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m primer_fast.bench.stages.right", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="op", help=f"of {', '.join(ops())}; without one, all")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="rewritten after every unit")
    parser.add_argument("--budget", type=float, metavar="S", help="begin nothing that would not end within S seconds")
    parser.add_argument("--small", action="store_true", help="small sizes and one layout of each op")
    parser.add_argument("--resume", action="store_true", help="try what the file lacks")
    args = parser.parse_args(argv)
    try:
        where, units = device(), checks(args.ops, args.small)
    except (RuntimeError, ValueError) as error:
        parser.error(str(error))
    header = environment.describe(where, args.small)
    report = (args.resume and resumed(args.json, RIGHT, header)) or Report(RIGHT, header)
    print(f"{len(units)} units; on an H100 about {estimate(units):.0f} s", flush=True)

    budget = None if args.budget is None else args.budget - (time.monotonic() - begin)
    alive = fill(
        report, args.json, units, lambda unit: rows_of(unit, args.small),
        lambda unit, why: unit.row(why).as_dict(), done=tried(report.rows),
        after=lambda unit, rows: print(line(unit, rows), flush=True), budget=budget,
        patience=FOREVER if args.small else _PATIENCE,
    )  # fmt: skip
    failed = sum(map(stages.wrong, report.rows))
    print(f"{len(report.rows)} results, {failed} wrong, {len(report.left_out)} units had no time")
    return int(failed > 0) if alive else LOST


if __name__ == "__main__":
    leave(main())
