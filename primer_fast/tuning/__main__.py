"""``python -m primer_fast.tuning``: the same as ``primer-fast tune`` with PyTorch and Triton alone."""

import argparse
import os
import sys
import time
from pathlib import Path

from primer_fast.bench.op import PRECISIONS
from primer_fast.kernels.tunable import TUNED
from primer_fast.proof.targets import TARGETS
from primer_fast.tuning import report, session


def main(argv: list[str] | None = None) -> int:
    """The exit status is 0, or 1 where a default could not be timed, or 2 for a wrong call."""
    parser = argparse.ArgumentParser(prog="python -m primer_fast.tuning", description=__doc__)
    parser.add_argument("ops", nargs="*", help="ops to tune; all if none is named")
    parser.add_argument(
        "--dtype", nargs="+", default=(), choices=PRECISIONS, help="bfloat16 and float32 if none is named"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything together (9)")
    parser.add_argument("--out", type=Path, default=TUNED, metavar="DIR", help="folder of <gpu>.json")
    parser.add_argument("--again", action="store_true", help="also buckets that stand there already")
    parser.add_argument("--dry-run", action="store_true", help="prune and compile, time and write nothing")
    parser.add_argument("--target", choices=TARGETS, help="with --dry-run: a GPU that need not be here")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="processes that compile")
    args = parser.parse_args(argv)
    begin = time.monotonic()
    try:
        check(args.minutes, args.jobs, args.dry_run, args.target)
        todo = session.plan(args.ops, args.dtype, target=args.target, out=args.out, again=args.again)
    except (ValueError, RuntimeError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{len(todo.sites)} buckets, {todo.candidates:,} candidates to compile, {todo.skipped} skipped", flush=True)
    rows = []
    left = max(0.0, 60 * args.minutes - (time.monotonic() - begin))
    try:
        for row in session.search(todo, left, jobs=args.jobs, out=None if args.dry_run else args.out):
            rows.append(row)
            if row.compiled is not None:
                print(f"{time.monotonic() - begin:4.0f} s  {report.line(row)}", flush=True)
    except KeyboardInterrupt:  # what was found is written
        print("interrupted", flush=True)
    print("\n" + report.text(report.counts(rows)))
    print(report.closing(todo, rows, time.monotonic() - begin, args.jobs))
    return 1 if any(row.failure and row.failure.startswith("failed") for row in rows) else 0


def check(minutes: float, jobs: int, dry_run: bool, target: str | None) -> None:
    """ValueError for options that do not go together."""
    if not minutes >= 0:
        raise ValueError(f"tune: minutes must be at least 0; got {minutes:g}")
    if jobs < 1:
        raise ValueError(f"tune: jobs must be at least 1; got {jobs}")
    if target is not None and not dry_run:
        raise ValueError(f"tune: target must come with --dry-run, as nothing can be timed there; got {target}")


if __name__ == "__main__":
    sys.exit(main())
