"""python -m primer_fast.bench: the table of ours against PyTorch, eager and compiled, on this machine."""

import argparse
import gc
import sys
import time
from pathlib import Path

import torch

from primer_fast import backend
from primer_fast.bench import ceilings, environment, tables, units
from primer_fast.bench import op as ops
from primer_fast.bench.agenda import planned
from primer_fast.bench.measure import Group, measure_group
from primer_fast.bench.op import FORWARD, FORWARD_BACKWARD, OURS, PASSES, PRECISIONS
from primer_fast.bench.report import FAILED, FAST, OK, OpRow, Report
from primer_fast.bench.timing import clock_for
from primer_fast.bench.units import FOREVER, LOST, DeviceLost, fill

_PASSES = {"forward": (FORWARD,), "backward": (FORWARD_BACKWARD,), "both": PASSES}
_CPU_PRECISIONS = ("float32", "bfloat16")  # without --dtype: the others have no fast product on most CPUs
_PATIENCE = 45.0  # seconds after which a group counts as hung; torch.compile may take half of it


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
    parser.add_argument("--small", action="store_true", help="the smallest case of each op and small ceilings")
    parser.add_argument("--json", metavar="FILE", help="write the report here, after every group of rows")
    parser.add_argument("--resume", action="store_true", help="measure what the file of --json lacks")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes most of the time")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.ops if name not in ops.names()]:
        parser.error(f"no benchmark named {', '.join(unknown)}; there are {', '.join(ops.names())}")
    return args


def main(argv: list[str] | None = None) -> int:
    """The exit status is 0; 1 if a row of ours failed or was wrong, 2 for a wrong call, units.LOST with the GPU."""
    args = parse(argv)
    began = time.monotonic()
    if backend.interpreting:
        print("bench: TRITON_INTERPRET is set, and the time of an interpreter says nothing; unset it", file=sys.stderr)
        return 2
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precisions = args.dtype or list(PRECISIONS if device == "cuda" else _CPU_PRECISIONS)
    precisions = precisions[: 1 if (args.quick or args.small) and not args.dtype else None]
    seconds = args.seconds_per_row or (0.05 if args.quick else 0.2 if device == "cuda" else 0.5)

    clock = clock_for(device)
    path = Path(args.json) if args.json else None
    header = environment.describe(device, args.small)
    found = units.resumed(path, FAST, header) if args.resume and path is not None else None
    if found is None:
        limits = ceilings.measure(device, precisions, clock, sizes=ceilings.SMALL if args.small else None)
        found = Report(FAST, header | {"measures": clock.measures, "ceilings": vars(limits)})
    limits = ceilings.Ceilings(**found.header["ceilings"])
    print("\n".join(tables.header_lines(found)), flush=True)

    loaded = []
    for name in args.ops or ops.names():
        try:
            op = ops.load(name)
            loaded.append(op.with_smallest_case() if args.small else op)
        except Exception as error:
            reason = f"cannot be imported: {type(error).__name__}: {error}"
            found.rows.append(OpRow(name, "all", "all", "all", OURS, status=FAILED, reason=reason))
            print(f"\n{tables.group_text(found.rows[-1:])}", flush=True)
    groups = planned(loaded, precisions, _PASSES[args.pass_name], device, 2 if args.quick else None)

    def measured(group: Group) -> list[OpRow]:
        try:
            return measure_group(group, clock, limits, seconds, with_compile=not args.no_compile)
        except DeviceLost:
            raise
        except Exception as error:  # the op's own declarations: its arrays, its FLOPs
            return [failed(group, f"{type(error).__name__}: {error}")]

    def failed(group: Group, reason: str) -> OpRow:
        return group.row(OURS, status=FAILED, reason=reason)

    gc.freeze()  # each timing begins with a garbage collection, which would look at all that was imported
    tried = {row.group for row in found.rows}
    alive = fill(
        found, path, groups, measured, failed,
        done=[str(group) for group in groups if failed(group, "").group in tried],
        after=lambda group, rows: print(f"\n{tables.group_text(rows)}", flush=True),
        budget=None if args.budget is None else args.budget - (time.monotonic() - began),
        patience=FOREVER if args.small else _PATIENCE,
    )  # fmt: skip
    if not alive:
        return LOST
    print("\n" + "\n".join(tables.closing_lines(found)))
    return int(any(row.status != OK for row in tables.ours(found)))


if __name__ == "__main__":
    units.leave(main())
