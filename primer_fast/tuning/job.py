"""What ``python -m primer_fast.tuning`` and ``primer-fast tune`` both do with their options."""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from primer_fast.backend import interpreting
from primer_fast.bench import environment, units
from primer_fast.bench.report import FAST, load
from primer_fast.kernels.tunable import TUNED
from primer_fast.tuning import portfolio, report, session
from primer_fast.tuning.compile import Workers
from primer_fast.tuning.record import Record

JOBS = max(1, (os.cpu_count() or 2) - 1)


@dataclass
class Request:
    """The options of ``python -m primer_fast.tuning``, which says what they mean."""

    ops: tuple[str, ...] = ()
    dtype: tuple[str, ...] = ()
    minutes: float = 9.0
    out: Path = TUNED
    again: bool = False
    dry_run: bool = False
    target: str | None = None
    jobs: int = JOBS
    json: Path | None = None
    report: Path | None = None
    small: bool = False
    resume: bool = False

    def check(self) -> None:
        """ValueError for what is out of range or does not go together."""
        if not self.minutes >= 0:
            raise ValueError(f"tune: minutes must be at least 0; got {self.minutes:g}")
        if self.jobs < 1:
            raise ValueError(f"tune: jobs must be at least 1; got {self.jobs}")
        if self.target is not None and not self.dry_run:
            raise ValueError(f"tune: target must come with --dry-run, as nothing can be timed there; got {self.target}")
        if self.resume and self.json is None:
            raise ValueError("tune: --resume must come with --json FILE")


class Job:
    """A search that is planned and can begin.

    Raises:
        ValueError: the request or a report is wrong.
        RuntimeError: there is neither a GPU nor a target.
        OSError: a file cannot be read.
    """

    def __init__(self, request: Request, workers: Workers):
        self.begin = time.monotonic()
        request.check()
        self.request, self.workers = request, workers
        given = load(request.report, FAST) if request.report else None
        header = environment.describe("cuda" if torch.cuda.is_available() else "cpu", request.small)
        self.record = None if request.json is None else Record(request.json, header, request.resume)
        many = workers.jobs > 1 or interpreting  # a process that interprets kernels cannot look for problems itself
        self.todo = session.plan(
            request.ops, request.dtype, target=request.target, out=request.out, again=request.again, report=given,
            small=request.small, workers=workers if many else None,
        )  # fmt: skip
        self.rows = self.todo.rows()

    def search(self, ended: Callable[[session.DecisionResult], object]) -> int:
        """Fill ``rows``; ``ended`` is called with each. Returns the exit status, see ``run``."""

        def write(row: session.DecisionResult) -> None:
            if self.record is not None:
                self.record.add(row, self.todo)
            ended(row)

        try:
            session.search(
                self.todo, self.rows, 60 * self.request.minutes - self.seconds, workers=self.workers,
                out=None if self.request.dry_run else self.request.out, ended=write,
                done=self.record.rows if self.record else (), marker=self.record.marker if self.record else None,
            )  # fmt: skip
        except units.DeviceLost:
            return units.LOST
        finally:
            if self.record is not None:
                self.record.close(self.todo)
        return int(any(row.failed for row in self.rows) or (self.record is not None and self.record.failed))

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self.begin

    def closing(self) -> str:
        """See report.closing."""
        return report.closing(self.todo, self.rows, self.seconds, self.request.jobs)


def run(request: Request, *, estimate: bool = False) -> int:
    """Search, and print what becomes of each problem; or only say how many problems fit into the time.

    Returns:
        The exit status: 0; 1 where a problem failed; 2 for a wrong call; 3 where another process must go on, since the
        GPU was lost or a problem hung: call it again, and with --resume where there is a file to go on with.
    """
    with Workers(JOBS if estimate else request.jobs) as workers:
        try:
            job = Job(request, workers)
        except (ValueError, RuntimeError, OSError) as error:
            print(f"primer-fast {error}", file=sys.stderr)
            return 2
        if estimate:
            print(portfolio.text(job.todo, request.jobs, request.minutes))
            return 0
        todo = job.todo
        print(f"{len(todo.decisions)} buckets, {todo.candidates:,} candidates to compile, {todo.skipped} skipped")
        print(portfolio.sentence(todo, request.jobs, request.minutes), flush=True)
        status = job.search(lambda row: print(f"{job.seconds:4.0f} s  {report.line(row)}", flush=True))
    print("\n" + report.text(report.counts(job.rows)))
    print(job.closing())
    if status == units.LOST:
        print("the GPU was lost: call it again", file=sys.stderr)
    return status
