"""How many problems a number of minutes is enough for, told before the search from what there is to compile and time.

The seconds of a candidate's compilation are measured; those around a call on a GPU are assumed.
"""

from typing import NamedTuple

from primer_fast.bench import op as ops
from primer_fast.bench.op import PRECISIONS
from primer_fast.tuning.problems import Decision, TunedCase, case_of
from primer_fast.tuning.search import FINAL, ROUNDS
from primer_fast.tuning.session import CLOSING, SearchPlan

COMPILE = 0.8  # seconds of one core for a candidate on sm_90, its compilers included: mean of 73, Triton 3.7
STARTING = 15.0  # assumed: imports, the search for problems, the processes
_AROUND = 1e-3  # assumed: a call's flush of the cache, and what the host does
_RUN = 0.03  # assumed: a run of the op that tells whether a candidate is right, beside the op's own time
_WIDE = 20  # assumed: PyTorch's own op in a wider dtype takes this many times as long


class DecisionEstimate(NamedTuple):
    """Estimated seconds of one problem, and when it is done, counted from the start of the program."""

    decision: Decision
    compiling: float
    timing: float
    done: float


def calls(candidates: int) -> int:
    """How often ``search.fastest`` calls something, the first calls included."""
    left = made = candidates
    for rounds in ROUNDS:
        if left <= 2:
            break
        made += rounds * left
        left = 1 + max(1, left // 2)
    return made + FINAL * (3 if candidates > 1 else 2)


def shares(todo: SearchPlan, jobs: int) -> list[DecisionEstimate]:
    """In the order of the search: ``jobs`` processes compile while one problem after another is timed."""
    found, compiled, timed = [], STARTING, STARTING
    for decision in todo.decisions:
        candidates = todo.pruned[decision].estimated
        whole = _seconds(todo, decision.unit)
        call = whole if decision.variants else decision.space.estimate(todo.gpu, decision.problem, candidates[0])
        compiling = COMPILE * len(candidates) / jobs
        timing = calls(len(candidates)) * (call + _AROUND) + len(candidates) * (whole + _RUN)
        timing += decision.variants * (_WIDE * whole + _RUN)
        compiled += compiling
        timed = max(timed, compiled) + timing
        found.append(DecisionEstimate(decision, compiling, timing, timed))
    return found


def _seconds(todo: SearchPlan, unit: TunedCase) -> float:
    """A forward and backward of a unit at 0.6 of the chip's rates."""
    op, case, precision = ops.load(unit.op), case_of(unit), PRECISIONS[unit.precision]
    rate = todo.gpu.tflops * 1e12 * 2 / precision.dtype.itemsize / (3 if precision.dtype.itemsize == 4 else 1)
    flops, moved = op.flops(case), op.bytes_moved(case, precision.dtype.itemsize)
    passes = ("forward", "backward") if case.gradients else ("forward",)
    least = max(sum(flops[p] for p in passes) / rate, sum(moved[p] for p in passes) / (todo.gpu.bandwidth * 1e12))
    return least / 0.6


def fitting(todo: SearchPlan, jobs: int, minutes: float) -> int:
    """How many problems are done in time."""
    return sum(share.done <= 60 * minutes - CLOSING for share in shares(todo, jobs))


def text(todo: SearchPlan, jobs: int, minutes: float, shown: int = 20) -> str:
    """A line for each of the first problems, and how many fit."""
    lines = ["  done  compile   time  problem"]
    lines += [
        f"{share.done:5.0f} s {share.compiling:6.1f} s {share.timing:5.1f} s  {share.decision}  ({share.decision.unit})"
        for share in shares(todo, jobs)[:shown]
    ]
    return "\n".join(lines) + "\n" + sentence(todo, jobs, minutes)


def sentence(todo: SearchPlan, jobs: int, minutes: float) -> str:
    return (
        f"{todo.gpu.name}: by estimate {fitting(todo, jobs, minutes)} of {len(todo.decisions)} problems "
        f"fit into {minutes:g} minutes with {jobs} compiling processes"
    )
