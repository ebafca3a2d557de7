"""Launches made with a candidate's settings, taken from a run of the op and made again by themselves, to be timed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from primer_fast.backend import interpreting
from primer_fast.bench.op import PRECISIONS
from primer_fast.kernels.tunable import watching
from primer_fast.tuning.problems import Candidate, Decision, caller, run

_Kernel = InterpretedFunction if interpreting else JITFunction


class Wrong(RuntimeError):
    """A candidate's results are not those of the default."""


@contextmanager
def _recording(owns: Callable[[str], bool]) -> Iterator[list[Callable[[], object]]]:
    """Launches go on as usual; those that ``owns`` says yes to can be made again with the same arguments."""
    launches: list[Callable[[], object]] = []
    usual = _Kernel.run

    def record(self, *args, grid, warmup, **kwargs):
        if owns(getattr(self, "fn", self).__name__):
            launches.append(lambda: usual(self, *args, grid=grid, warmup=warmup, **kwargs))
        return usual(self, *args, grid=grid, warmup=warmup, **kwargs)

    _Kernel.run = record
    try:
        yield launches
    finally:
        _Kernel.run = usual


def launches_of(
    decision: Decision, settings: tuple | None, arrays: dict[str, Tensor], want: tuple[Tensor, ...] | None = None
) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
    """A function that makes the launches of one choice again, and the results of the whole run.

    Args:
        settings: None for the default.
        want: results that the run's must agree with.

    Raises:
        Wrong: they do not, by the benchmarks' tolerance for the precision.
    """
    candidate = Candidate(decision, settings)
    with watching(candidate), _recording(candidate.owns) as launches:
        got = run(decision.unit, arrays)
    if not launches:
        raise RuntimeError(f"nothing was launched for {decision}")
    if want is not None:
        _compare(got, want, PRECISIONS[decision.unit.precision].tolerance)

    def replay() -> None:
        for launch in launches:
            launch()

    return replay, got


def whole_call(
    decision: Decision, settings: tuple, arrays: dict[str, Tensor], want: tuple[Tensor, ...]
) -> Callable[[], object]:
    """A function that runs the whole op with one way of a choice: ways differ in more than kernels, in copies say.

    Raises:
        Wrong: its results are not ``want``, by the benchmarks' tolerance for the precision.
    """
    candidate, call = Candidate(decision, settings), caller(decision.unit, arrays)

    def again() -> tuple[Tensor, ...]:
        with watching(candidate):
            return call()

    got = again()
    if not candidate.met:
        raise RuntimeError(f"{decision} was not met")
    _compare(got, want, PRECISIONS[decision.unit.precision].tolerance)
    return again


def _compare(got: tuple[Tensor, ...], want: tuple[Tensor, ...], tolerance: float) -> None:
    for index, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        mine, theirs = mine.float(), theirs.float()
        error = float(torch.linalg.vector_norm(mine - theirs) / torch.linalg.vector_norm(theirs).clamp_min(1e-20))
        if not error <= tolerance:  # NaN too
            raise Wrong(f"result {index} is off by {error:.1e} of its norm, where {tolerance:.0e} is allowed")
