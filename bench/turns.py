"""Training steps of the same model by several programs, in turns: losses are compared first, then steps are timed."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from primer_fast.bench.memory import peak_bytes
from primer_fast.bench.op import OURS
from primer_fast.bench.peers import NotAvailable
from primer_fast.bench.timing import Timing, WallClock, time_interleaved
from primer_fast.bench.trial import FAILED, NOT_AVAILABLE, WRONG, Goal, Trial

COMPARED = 4  # steps whose losses must agree before anything is timed
Step = Callable[[], Tensor]  # one optimizer step on the program's next batch -> () its loss


def take_turns(
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
) -> list[Trial]:
    """A trial for each provider. Every step of every provider sees the same batch as the same step of ours.

    Raises:
        Exception: ours failed; whatever it raised.
    """
    goals = goals or {}
    trials = {provider: Trial(name, setting, provider, unit=unit) for provider in steps}
    running, losses = {}, {provider: [] for provider in steps}
    for provider in sorted(steps, key=lambda provider: provider != OURS):
        try:
            run = _recorded(steps[provider](), losses[provider], device)
            for _ in range(COMPARED):
                run()
            apart = _apart(losses[provider], losses[OURS])
            scale = max(abs(loss) for loss in losses[OURS])
            if not apart <= tolerance * scale:
                trials[provider].status = WRONG
                trials[provider].reason = f"losses of the first {COMPARED} steps are {apart:.2g} apart from ours"
                continue
            trials[provider].peak_mib = _mib(peak_bytes(run, device))
            running[provider] = run
        except Exception as error:
            if provider == OURS:
                raise
            trials[provider].status, trials[provider].reason = failure(error)
    timings = time_interleaved(running, WallClock(), seconds)
    if isinstance(timings[OURS], Exception):
        raise timings[OURS]
    for provider, timing in timings.items():
        trial = trials[provider]
        if not isinstance(timing, Timing):
            trial.status, trial.reason, trial.peak_mib = *failure(timing), None
            continue
        trial.time([ms / 1e3 for ms in timing.samples], [ms / 1e3 for ms in timings[OURS].samples], work)
        trial.loss = losses[provider][-1]
        trial.loss_difference = None if provider == OURS else _apart(losses[provider], losses[OURS])
        if provider in goals:
            trial.targets.append(goals[provider].judged(trial.versus))
    return list(trials.values())


def failure(error: Exception) -> tuple[str, str]:
    """Status and reason of a provider that raised."""
    first_line = (str(error).strip().splitlines() or [""])[0][:300]
    if isinstance(error, NotAvailable):
        return NOT_AVAILABLE, first_line
    if isinstance(error, ModuleNotFoundError):
        return NOT_AVAILABLE, f"not installed: {first_line}"
    return FAILED, f"{type(error).__name__}: {first_line}"


def _recorded(step: Step, losses: list[float], device: str) -> Callable[[], None]:
    """``step`` with its loss read at the end, which on a GPU also waits for it."""

    def run():
        losses.append(float(step()))
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def _apart(losses: list[float], others: list[float]) -> float:
    """The largest distance at the same step; NaN where a loss is."""
    distances = [abs(a - b) for a, b in zip(losses, others, strict=False)]
    return next((d for d in distances if math.isnan(d)), max(distances))


def _mib(count: int | None) -> float | None:
    return None if count is None else count / 2**20
