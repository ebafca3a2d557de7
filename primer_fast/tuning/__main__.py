"""The search of `primer-fast tune`, with PyTorch and Triton alone, and with what `make gpu-tune` needs besides."""

import argparse
from pathlib import Path

from primer_fast.bench.op import PRECISIONS
from primer_fast.bench.units import leave
from primer_fast.kernels.tunable import TUNED
from primer_fast.proof.targets import TARGETS
from primer_fast.tuning.job import JOBS, Request, run


def main(argv: list[str] | None = None) -> int:
    """The exit status: see ``run``."""
    parser = argparse.ArgumentParser(prog="python -m primer_fast.tuning", description=__doc__)
    parser.add_argument("ops", nargs="*", help="ops to tune; all if none is named")
    parser.add_argument(
        "--dtype", nargs="+", default=(), choices=PRECISIONS, help="bfloat16 and float32 if none is named"
    )
    limit = parser.add_mutually_exclusive_group()
    limit.add_argument("--minutes", type=float, default=9.0, help="for everything together (9)")
    limit.add_argument("--budget", type=float, metavar="SECONDS", help="the same in seconds")
    parser.add_argument("--out", type=Path, default=TUNED, metavar="DIR", help="folder of <gpu>.json")
    parser.add_argument("--again", action="store_true", help="also buckets that stand there already")
    parser.add_argument("--dry-run", action="store_true", help="prune and compile, time and write nothing")
    parser.add_argument("--target", choices=TARGETS, help="with --dry-run: a GPU that need not be here")
    parser.add_argument("--jobs", type=int, default=JOBS, help="processes that compile")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what became of each problem, after each")
    parser.add_argument("--resume", action="store_true", help="go on with what FILE holds")
    parser.add_argument(
        "--from", type=Path, dest="report", metavar="REPORT",
        help="report of `python -m primer_fast.bench`: cases furthest below target come first; "
        "if none is named, the newest that is committed for this GPU",
    )  # fmt: skip
    parser.add_argument("--small", action="store_true", help="two tiny problems alone, to see that it runs")
    parser.add_argument(
        "--estimate", action="store_true", help="say how many problems fit into the time, on --target or sm_90, and end"
    )
    options = vars(parser.parse_args(argv))
    estimate, budget = options.pop("estimate"), options.pop("budget")
    if budget is not None:
        options["minutes"] = budget / 60
    if estimate:
        options |= {"dry_run": True, "target": options["target"] or "sm_90"}
    return run(Request(**options), estimate=estimate)


if __name__ == "__main__":
    leave(main())
