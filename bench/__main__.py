"""python -m primer_fast.bench: the table of ours against PyTorch, eager and compiled, on this machine."""

import argparse
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable

import torch

from primer_fast import backend
from primer_fast.bench import ceilings, environment, tables
from primer_fast.bench import op as ops
from primer_fast.bench.measure import DeviceLost, Group, measure_group
from primer_fast.bench.op import FORWARD, FORWARD_BACKWARD, OURS, PASSES, PRECISIONS, Op
from primer_fast.bench.report import Report, Row
from primer_fast.bench.timing import clock_for

_PASSES = {"forward": (FORWARD,), "backward": (FORWARD_BACKWARD,), "both": PASSES}
_CPU_PRECISIONS = ("float32", "bfloat16")  # without --dtype: the others have no fast product on most CPUs


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m primer_fast.bench", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="op", help=f"of {', '.join(ops.names())}; without one, all")
    parser.add_argument("--dtype", nargs="+", choices=list(PRECISIONS), metavar="D", help="of " + ", ".join(PRECISIONS))
    parser.add_argument(
        "--pass", dest="pass_name", choices=list(_PASSES), default="both", help="backward includes forward"
    )
    parser.add_argument(
        "--quick", action="store_true", help="the two most important cases of each op, one dtype, briefly"
    )
    parser.add_argument("--seconds-per-row", type=float, metavar="S", help="default 0.2 on a GPU, 0.5 on a CPU")
    parser.add_argument(
        "--budget", type=float, metavar="S", help="stop after about S seconds; what is left out is listed"
    )
    parser.add_argument("--json", metavar="FILE", help="write the report here, after every group of rows")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes most of the time")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.ops if name not in ops.names()]:
        parser.error(f"no benchmark named {', '.join(unknown)}; there are {', '.join(ops.names())}")
    return args


def planned(
    loaded: Iterable[Op], precisions: Iterable[str], passes: Iterable[str], device: str, most: int | None = None
):
    """Groups, the most important first: the first precision of every op before the second of any."""
    loaded, passes = list(loaded), list(passes)
    return [
        Group(op, case, precision, pass_name, device)
        for precision in precisions
        for op in loaded
        for case in op.cases(device)[:most]
        for pass_name in op.passes(passes)
        if case.gradients or pass_name == FORWARD
    ]


def run(
    groups: list[Group],
    measured: Callable[[Group], list[Row]],
    report: Report,
    budget: float | None = None,
    after: Callable[[list[Row]], None] = lambda rows: None,
    now: Callable[[], float] = time.monotonic,
) -> None:
    """Measure the groups into ``report`` until ``budget`` seconds are spent; ``after`` sees the rows of each.

    A group is begun only if the longest of the last few would still fit.
    """
    begin, recent = now(), deque([0.0], maxlen=6)  # not all of them: the very first also starts the compiler
    for number, group in enumerate(groups):
        started = now()
        if budget is not None and started - begin + max(recent) > budget:
            report.left_out += [str(left) for left in groups[number:]]
            return
        try:
            rows = measured(group)
        except DeviceLost as error:
            report.rows.append(group.row(OURS, status="failed", reason=f"the GPU was lost: {error}"))
            report.left_out += [str(left) for left in groups[number + 1 :]]
            after([report.rows[-1]])
            return
        except Exception as error:  # the op's own declarations: its arrays, its FLOPs
            rows = [group.row(OURS, status="failed", reason=f"{type(error).__name__}: {error}")]
        report.rows += rows
        recent.append(now() - started)
        after(rows)


def main(argv: list[str] | None = None) -> int:
    """The exit status is 0, or 1 if a row of ours failed or was wrong, or 2 for a wrong call."""
    args = parse(argv)
    began = time.monotonic()
    if backend.interpreting:
        print("bench: TRITON_INTERPRET is set, and the time of an interpreter says nothing; unset it", file=sys.stderr)
        return 2
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precisions = args.dtype or list(PRECISIONS if device == "cuda" else _CPU_PRECISIONS)
    precisions = precisions[: 1 if args.quick and not args.dtype else None]
    seconds = args.seconds_per_row or (0.05 if args.quick else 0.2 if device == "cuda" else 0.5)

    clock = clock_for(device)
    header = environment.describe(device) | {"measures": clock.measures}
    limits = ceilings.measure(device, precisions, clock)
    report = Report(header | {"ceilings": vars(limits)})
    print("\n".join(tables.header_lines(report)), flush=True)

    loaded = []
    for name in args.ops or ops.names():
        try:
            loaded.append(ops.load(name))
        except Exception as error:
            reason = f"cannot be imported: {type(error).__name__}: {error}"
            report.rows.append(Row(name, "all", "all", "all", OURS, status="failed", reason=reason))
            print(f"\n{tables.group_text(report.rows[-1:])}", flush=True)
    groups = planned(loaded, precisions, _PASSES[args.pass_name], device, 2 if args.quick else None)

    def measured(group: Group) -> list[Row]:
        return measure_group(group, clock, limits, seconds, with_compile=not args.no_compile)

    def after(rows: list[Row]) -> None:
        print(f"\n{tables.group_text(rows)}", flush=True)
        if args.json:
            report.save(args.json)

    budget = None if args.budget is None else args.budget - (time.monotonic() - began)
    try:
        run(groups, measured, report, budget, after)
    except KeyboardInterrupt:
        done = {row.group for row in report.rows}
        report.left_out = [str(g) for g in groups if (g.op.name, g.case.name, g.precision, g.pass_name) not in done]
    if args.json:
        report.save(args.json)
    print("\n" + "\n".join(tables.closing_lines(report)))
    return int(any(row.status != "ok" for row in tables.ours(report)))


if __name__ == "__main__":
    sys.exit(main())
