"""Training steps of the same model by several programs, in turns: losses are compared first, then steps are timed."""

import math
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from primer_fast.bench.memory import peak_bytes
from primer_fast.bench.op import OURS
from primer_fast.bench.peers import noted
from primer_fast.bench.report import OK, WRONG, Goal, ProgramRow
from primer_fast.bench.timing import MIN_ROUNDS, WallClock, time_interleaved
from primer_fast.train.cuda_graphs import WARM_UP

COMPARED = 4  # steps whose losses must agree before anything is timed
Step = Callable[[], Tensor]  # one optimizer step on the program's next batch -> () its loss


def compare_steps(
    name: str,
    setting: str,
    steps: Mapping[str, Callable[[], Step]],  # by provider, ours among them: makes the program; may raise
    *,
    work: float,  # units that a step handles
    unit: str,
    seconds: float,  # about as long as each provider is timed
    device: str,
    goals: Mapping[str, Goal] | None = None,  # by provider: a bound on its time over ours
    tolerance: float = 1e-4,  # relative distance of the first losses from ours
    compared: int = COMPARED,  # steps whose losses are compared
    least: int = MIN_ROUNDS,  # rounds that are timed however long they take
    small: bool = False,  # as few steps as it takes to see each program run, ours up to the replay of a CUDA graph
) -> list[ProgramRow]:
    """A row for each provider. Every step of every provider sees the same batch as the same step of ours.

    Raises:
        Exception: ours failed; whatever it raised.
        DeviceLost: a provider left the GPU unusable.
    """
    goals, clock = goals or {}, _QueueClock(0.0 if small else 50.0) if device == "cuda" else WallClock()
    rows = {provider: ProgramRow(name, setting, provider, unit=unit) for provider in steps}
    running: dict[str, Callable[[], None]] = {}
    losses: dict[str, list[float | Tensor]] = {provider: [] for provider in steps}
    for provider in sorted(steps, key=lambda provider: provider != OURS):
        row = rows[provider]
        with noted(row, device):
            run = _recorded(steps[provider](), losses[provider], device)
            count = compared if not small else min(compared, WARM_UP + 1) if provider == OURS else 1
            for _ in range(count - 1):
                run()
            peak = peak_bytes(run, device)  # of the last step: ours may record a CUDA graph in it, which takes memory
            first, ours = _numbers(losses[provider]), _numbers(losses[OURS])[:compared]
            apart = _apart(first, ours)
            if provider == OURS and not math.isfinite(apart):
                raise RuntimeError("a loss of ours is no number")
            if apart <= tolerance * max(abs(loss) for loss in ours):
                row.peak_mib, running[provider] = None if peak is None else peak / 2**20, run
            else:
                row.status, row.reason = WRONG, f"losses of the first {count} steps are {apart:.2g} apart from ours"
    timings = time_interleaved(running, clock, seconds, 1 if small else least)
    ours = _numbers(losses[OURS])
    for provider, timing in timings.items():
        row = rows[provider]
        with noted(row, device):
            row.time_as(timing, timings[OURS], work)
        if row.status != OK:
            row.peak_mib = None
            continue
        found = _numbers(losses[provider])
        row.loss, row.loss_difference = found[-1], None if provider == OURS else _apart(found, ours)
        if not all(map(math.isfinite, found)):  # which JSON cannot say
            row.status, row.reason, row.loss = WRONG, "a loss is no number", None
        if not math.isfinite(row.loss_difference or 0.0):
            row.loss_difference = None
        if provider in goals and row.status == OK:
            row.targets.append(goals[provider].judged(row.versus))
    return list(rows.values())


class _QueueClock(WallClock):
    """A GPU's steps as a training loop runs them: one queued after the other, waited for at the end of a sample."""

    def __init__(self, at_least_ms: float):
        self.at_least_ms = at_least_ms  # of a sample

    def sampler(self, function: Callable[[], object], min_ms: float = 0.0) -> Callable[[], float]:
        if not self.at_least_ms:
            return lambda: self._elapsed_ms(function, 1)
        return super().sampler(function, self.at_least_ms)

    @staticmethod
    def _elapsed_ms(function: Callable[[], object], calls: int) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter_ns()
        for _ in range(calls):
            function()
        torch.cuda.synchronize()
        return (time.perf_counter_ns() - begin) / 1e6


def _recorded(step: Step, losses: list[float | Tensor], device: str) -> Callable[[], None]:
    """``step`` with its loss kept: on a GPU as a tensor, since reading it would wait for the device."""

    def run():
        loss = step().detach()
        losses.append(loss if device == "cuda" else float(loss))

    return run


def _numbers(losses: list[float | Tensor]) -> list[float]:
    return [float(loss) for loss in losses]


def _apart(losses: list[float], others: list[float]) -> float:
    """The largest distance at the same step; NaN where a loss is."""
    distances = [abs(a - b) for a, b in zip(losses, others, strict=False)]
    return next((d for d in distances if math.isnan(d)), max(distances))
