"""python -m primer_fast.bench.stages.compile: compile what `make gpu` launches, before anything waits for it.

Kernels are compiled ahead of time for this machine's GPU, the cases of the benchmarks first; Triton's cache then has
them. What torch.compile makes of the rows that are timed first is compiled too, into Inductor's cache.
"""

import argparse
import contextlib
import functools
import importlib
import multiprocessing
import os
import queue
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path

import torch

from primer_fast.bench import environment
from primer_fast.bench import op as ops
from primer_fast.bench.agenda import ROWS, planned
from primer_fast.bench.measure import Group, prepared
from primer_fast.bench.op import COMPILED, PASSES
from primer_fast.bench.report import COMPILE, Report
from primer_fast.bench.stages.right import ORDER, other_cases
from primer_fast.bench.units import leave
from primer_fast.kernels.device import Chip, chip
from primer_fast.proof.production import CaseOnTarget, cases_to_compile, compiled_launches, end_with_parent

_PEER_JOBS = 8  # each holds the tensors of a case on the GPU


@dataclass(frozen=True)
class CompiledTask:
    """What was compiled in one go: the kernels of a case, or what torch.compile made of a row of the benchmarks."""

    what: str
    launches: int
    errors: list[str]
    seconds: float  # of one core, those of its compilers included


def units_of(dtype: str, most: int | None = None) -> list[CaseOnTarget]:
    """The production cases and the benchmarks' own, at most so many of an op; the first of every op come first."""
    found = []
    for name in ops.names():
        declared = [unit.case for unit in cases_to_compile([name], dtypes=[dtype])]
        known = {case.name for case in declared}
        declared += [case for case in ops.load(name).gpu_cases if case.name not in known]
        found.append([CaseOnTarget(name, case, dtype, "sm_90") for case in declared[:most]])
    return [unit for row in zip_longest(*found) for unit in row if unit is not None]


def our_units(small: bool = False) -> list[CaseOnTarget]:
    """All that is compiled of ours: what is timed or judged in bfloat16, other checks' cases, the other dtypes."""
    dtypes, most = (ORDER[:1], 1) if small else (ORDER, None)
    first, *others = [units_of(dtype, most) for dtype in dtypes]
    first += [CaseOnTarget(op, case, ORDER[0], "sm_90") for op, case in other_cases()[:most]]
    return [*first, *chain(*others)]


def _core_seconds() -> float:
    """What this process and the compilers that it started have used."""
    return sum(os.times()[:4])


def both_ways(unit: CaseOnTarget) -> list[CaseOnTarget]:
    """Forward and backward, and the forward by itself, which keeps nothing for a backward."""
    alone = unit._replace(case=replace(unit.case, gradients=False))
    return [unit, alone] if unit.case.gradients else [unit]


def _make_launcher(compiled) -> None:
    """Up to 3.6, Triton compiles a C function for a kernel's signature at its first launch; have it beforehand."""
    driver = importlib.import_module("triton.backends.nvidia.driver")
    if compiled is not None and hasattr(driver, "make_launcher") and _has_utilities():
        driver.CudaLauncher(compiled.src, compiled.metadata)


@functools.cache
def _has_utilities() -> bool:
    """Load what a launcher needs of Triton's driver; without CUDA's library there is none, nor a GPU to launch on."""
    with contextlib.suppress(AssertionError):
        importlib.import_module("triton.backends.nvidia.driver").CudaUtils()
        return True
    return False


def compile_unit(unit: CaseOnTarget, gpu: Chip) -> CompiledTask:
    """Compile a unit both ways."""
    begin, count, errors = _core_seconds(), 0, []
    for one in both_ways(unit):
        launches, _, error = compiled_launches(one, gpu)
        count += len(launches)
        for launch in launches:
            _make_launcher(launch.compiled)
        errors += [error] if error else []
        errors += [f"{launch.kernel}: {launch.error}" for launch in launches if launch.error]
    return CompiledTask(f"{unit.op} {unit.case} {unit.dtype}", count, errors, _core_seconds() - begin)


def peers(most: int | None = None) -> list[tuple[str, str, str, str]]:
    """The first rows of the benchmarks: op, case, precision and pass; at most so many."""
    groups = planned([ops.load(name) for name in ops.names()], ["bfloat16", "float32"], PASSES, "cuda")
    return [group.row(COMPILED).group for group in groups[: len(ROWS) if most is None else most]]


def compile_peer(op: str, case: str, precision: str, pass_name: str, small: bool) -> CompiledTask:
    """What torch.compile makes of PyTorch's own op. A failure is no error here: the benchmarks will report it."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # this process is one of many that compile
    begin, declared = _core_seconds(), ops.load(op)
    declared = declared.with_smallest_case() if small else declared
    chosen = next((c for c in declared.gpu_cases if c.name == case), declared.gpu_cases[0])
    with contextlib.suppress(Exception):
        prepared(Group(declared, chosen, precision, pass_name, "cuda"), COMPILED)
    torch.cuda.empty_cache()  # the other processes need the memory
    return CompiledTask(f"torch.compile {op} {case} {precision} {pass_name}", 0, [], _core_seconds() - begin)


def compile_program(small: bool) -> CompiledTask:
    """What torch.compile makes of nanoGPT's training step, which whole programs are compared with."""
    from primer_fast.bench import models  # here: every process imports this file, and one needs that

    begin = _core_seconds()
    with contextlib.suppress(Exception):
        models.warm(small)
    return CompiledTask("torch.compile nanoGPT", 0, [], _core_seconds() - begin)


def _begin(many: bool) -> None:
    """In a worker; ``many`` short tasks wait for the few long ones, which would end last otherwise."""
    end_with_parent()
    if many:
        os.nice(10)


def compile_all(
    tasks: Sequence[Sequence[tuple]], jobs: Sequence[int], after: Callable[[CompiledTask], None], seconds: float
) -> list[str]:
    """Call every (name, function, *arguments) of each list in processes of its own, ``jobs`` of them, side by side.

    Those of the first list, the many, give way to the others.

    Args:
        after: sees each CompiledTask as it comes; what a function raises is a CompiledTask with that error.
        seconds: after which what is left is given up.

    Returns:
        The names of what was given up.
    """
    end, left = time.monotonic() + seconds, {name for some in tasks for name, *_ in some}
    rows: queue.Queue[CompiledTask] = queue.Queue()
    context = multiprocessing.get_context("spawn")  # torch and Triton have threads: no fork
    with contextlib.ExitStack() as pools:
        for number, (some, count) in enumerate(zip(tasks, jobs, strict=True)):
            pool = pools.enter_context(context.Pool(min(count, max(len(some), 1)), _begin, (number == 0,)))
            for name, function, *arguments in some:

                def failed(error: BaseException, name: str = name) -> None:
                    rows.put(CompiledTask(name, 0, [f"{type(error).__name__}: {error}".splitlines()[0]], 0.0))

                pool.apply_async(function, arguments, callback=rows.put, error_callback=failed)
        while left:
            try:
                row = rows.get(timeout=max(0.0, end - time.monotonic()))
            except (queue.Empty, KeyboardInterrupt):
                break
            left.discard(row.what)
            after(row)
    return sorted(left)


def main(argv: list[str] | None = None) -> int:
    """The exit status is 0, or 1 where one of our kernels does not compile, or 2 for a wrong call."""
    parser = argparse.ArgumentParser(
        prog="python -m primer_fast.bench.stages.compile", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="write what was compiled here")
    parser.add_argument("--budget", type=float, default=60.0, metavar="S", help="stop after S seconds (60)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes for our kernels (all cores)")
    parser.add_argument("--small", action="store_true", help="one case of each op, in bfloat16")
    parser.add_argument("--resume", action="store_true", help="changes nothing: what was compiled is in the cache")
    args = parser.parse_args(argv)
    if args.jobs < 1 or args.budget <= 0:
        parser.error(f"--jobs and --budget must be positive; got {args.jobs} and {args.budget:g}")
    if not torch.cuda.is_available():
        print("bench.compile: this Python sees no CUDA GPU to compile for", file=sys.stderr)
        return 2
    begin, gpu, report = time.monotonic(), chip(), Report(COMPILE, environment.describe("cuda", args.small))
    ours = [(f"{u.op} {u.case} {u.dtype}", compile_unit, u, gpu) for u in our_units(args.small)]
    theirs: list[tuple] = [("torch.compile nanoGPT", compile_program, args.small)]  # the longest, so the first
    asked = peers(1 if args.small else None)
    jobs = [1, 1] if args.small else [args.jobs, _PEER_JOBS]  # starting a process takes longer than its few tasks
    theirs += [("torch.compile " + " ".join(row), compile_peer, *row, args.small) for row in asked]
    report.beside = {"jobs": jobs[0], "launches": 0}

    def save() -> None:
        report.beside["seconds"] = round(time.monotonic() - begin, 1)
        report.save(args.json)

    def after(row: CompiledTask) -> None:
        report.rows.append(asdict(row))
        report.beside["launches"] += row.launches
        print(f"{time.monotonic() - begin:5.1f} s  {row.what}: {row.launches} launches", *row.errors, flush=True)
        save()

    left = compile_all([ours, theirs], jobs, after, args.budget - (time.monotonic() - begin))
    report.left_out = left
    save()
    launches, seconds = (report.beside[name] for name in ("launches", "seconds"))
    failed = sum(bool(row["errors"]) for row in report.rows)
    print(f"{launches} launches in {seconds:.0f} s; {failed} cases with errors; {len(left)} had no time")
    return int(failed > 0)


if __name__ == "__main__":
    leave(main())
