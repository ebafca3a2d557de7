"""Candidates compiled ahead of time, in processes beside the one that times; Triton's cache then has what is timed."""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from primer_fast.kernels.device import Chip, assume_chip, chip
from primer_fast.kernels.tunable import watching
from primer_fast.proof.offline import Launch, offline
from primer_fast.proof.production import end_with_parent
from primer_fast.proof.resources import registers_and_spills
from primer_fast.proof.targets import Target
from primer_fast.tuning.problems import Candidate, Decision, arrays_of, run
from primer_fast.tuning.prune import Compiled

LONGEST = 60.0  # seconds of waiting for one candidate: a compiler that dies takes its process along


class CandidateTask(NamedTuple):
    """One candidate of one problem, or with None for settings all launches of its unit."""

    decision: Decision
    settings: tuple | None
    gpu: Chip
    target: Target


def chip_of(target: Target) -> Chip:
    """The chip that launchers see where they compile for a target."""
    with offline(target):
        return chip()


def compile_candidate(task: CandidateTask) -> Compiled:
    """Compile what is launched with a candidate; what goes wrong is its ``error``."""
    begin = time.perf_counter()
    candidate = Candidate(task.decision, task.settings)
    error = None
    wanted = candidate.owns if task.settings is not None else lambda kernel: True
    with offline(task.target, keep_going=True, wanted=wanted) as launches, assume_chip(task.gpu), watching(candidate):
        try:
            run(task.decision.unit, arrays_of(task.decision.unit, "meta"))
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}".splitlines()[0]
    errors = [error, *(launch.error for launch in launches), None if launches else "nothing was launched"]
    error = next(filter(None, errors), None)
    seconds = time.perf_counter() - begin
    if error is not None:
        return Compiled(task.settings, error, seconds=seconds)
    used = [registers_and_spills(launch.compiled, task.target) for launch in launches]
    return Compiled(
        task.settings, None, max(r for r, _ in used), max(spilled for _, spilled in used),
        max(launch.compiled.metadata.shared for launch in launches), " ".join(map(_code, launches)),
        time.perf_counter() - begin,
    )  # fmt: skip


def _code(launch: Launch) -> str:
    return f"{launch.kernel}{launch.grid}{launch.constexprs}{launch.options}"


class Compilers:
    """Tasks that are compiled in the order given."""

    def __init__(self, pool, tasks: Iterable[CandidateTask]):
        self._results = {task[:2]: pool.apply_async(compile_candidate, (task,)) for task in tasks}

    def result(self, decision: Decision, settings: tuple | None, seconds: float) -> Compiled:
        """Wait for a candidate; TimeoutError past ``seconds``."""
        try:
            return self._results.pop((decision, settings)).get(max(0.0, min(seconds, LONGEST)))
        except multiprocessing.TimeoutError:
            if seconds < LONGEST:
                raise TimeoutError from None
            return Compiled(settings, f"not compiled within {LONGEST:.0f} s")


class Workers:
    """Processes that compile, even where this one interprets kernels. They start when there is work for them.

    As a context they end with the block, whatever they are at.
    """

    def __init__(self, jobs: int):
        self.jobs = jobs
        self._pool: Any = None

    def _started(self):
        if self._pool is None:
            context = multiprocessing.get_context("spawn")  # torch and Triton have threads: no fork
            interpret = os.environ.pop("TRITON_INTERPRET", None)  # a process has the environment of its start
            try:
                self._pool = context.Pool(self.jobs, end_with_parent)
            finally:
                if interpret is not None:
                    os.environ["TRITON_INTERPRET"] = interpret
        return self._pool

    def map(self, function: Callable, items: Iterable) -> list:
        """The results of a function that processes can import, in the order of the items."""
        return self._started().map(function, items, chunksize=1)

    def compile(self, tasks: Iterable[CandidateTask]) -> Compilers:
        """Begin to compile; what is needed first comes first."""
        return Compilers(self._started(), tasks)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_) -> None:
        if self._pool is not None:
            self._pool.terminate()
            self._pool.join()
