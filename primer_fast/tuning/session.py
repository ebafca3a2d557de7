"""One search: problems in order of importance, pruned, compiled, timed and written within a number of minutes."""

import time
from collections.abc import Callable, Hashable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from primer_fast.bench.report import Report
from primer_fast.bench.timing import Clock, clock_for
from primer_fast.bench.units import check_device, each, one_line
from primer_fast.kernels.device import Chip, chip
from primer_fast.kernels.tunable import TUNED
from primer_fast.proof.targets import TARGETS, Target, target_of
from primer_fast.tuning import order, prune, tuned_file
from primer_fast.tuning.compile import LONGEST, CandidateTask, Compilers, Workers, chip_of
from primer_fast.tuning.problems import Decision, TunedCase, arrays_of, by_torch, decisions_of, distinct, units
from primer_fast.tuning.replay import launches_of, whole_call
from primer_fast.tuning.search import Fastest, Sampler, fastest

CLOSING = 10.0  # seconds kept for ending
_FAIR = 4.0  # a problem may take this many times its even share of the time
_PATIENCE = LONGEST + 60.0  # seconds after which a problem hangs; one waits for a compiler for LONGEST at most
_SMALL = (TunedCase("linear", "primer", "float32"),)


@dataclass
class DecisionResult:
    """What became of one problem; counts of candidates, None for stages that it did not reach."""

    decision: Decision
    candidates: int
    legal: int
    estimated: int
    compiled: int | None = None
    compile_seconds: float = 0.0
    registers: int = 0  # the most of those left
    outcome: Fastest | None = None
    default: Any = None  # settings
    failure: str | None = None

    @property
    def gain(self) -> float | None:
        """Time of the default over that of the settings found."""
        return None if self.outcome is None else self.outcome.default_seconds / self.outcome.seconds

    @property
    def failed(self) -> bool:
        """Whether the default was wrong, could not be launched, or took the process along."""
        return self.failure is not None and self.failure.startswith("failed")

    @property
    def status(self) -> str:
        if self.failure is not None:
            return self.failure
        if self.outcome is None:
            return "not compiled" if self.compiled is None else "compiled"
        return f"{self.gain:.2f} x" if self.outcome.settings != self.default else "default"


@dataclass
class SearchPlan:
    """The problems to work on, in this order, and what is left of their candidates."""

    gpu: Chip
    target: Target
    decisions: list[Decision]
    skipped: int  # problems whose buckets have an entry already
    pruned: dict[Decision, prune.Pruned]
    needs: order.Need = field(default_factory=dict)

    @property
    def firsts(self) -> set[Decision]:
        """The first problem of each unit."""
        return set({decision.unit: decision for decision in reversed(self.decisions)}.values())

    @property
    def candidates(self) -> int:
        """What is to be compiled."""
        return sum(len(pruned.estimated) for pruned in self.pruned.values())

    def rows(self) -> list[DecisionResult]:
        """Of each problem what is known before the search."""
        return [
            DecisionResult(decision, *self.pruned[decision][:2], len(self.pruned[decision].estimated))
            for decision in self.decisions
        ]


def plan(
    ops: Iterable[str] = (), dtypes: Iterable[str] = (), *, target: str | None = None, out: Path = TUNED,
    again: bool = False, factor: float = prune.FACTOR, most: int = prune.MOST,
    report: Report | None = None, small: bool = False, workers: Workers | None = None,
) -> SearchPlan:  # fmt: skip
    """Find the problems and prune by what needs no compiler.

    Args:
        target: name of one of TARGETS, to compile for without a GPU; None for the GPU of this machine.
        out: folder of the files; buckets that stand there are left out unless ``again``.
        factor, most: see prune.by_estimate.
        report: of the ops on this GPU; None for the newest that is committed. Cases far below target come first.
        small: two tiny problems alone, one of settings and one of variants, few candidates each.
        workers: look for problems there, not in this process.

    Raises:
        ValueError: an op, a dtype or the target is unknown.
        RuntimeError: there is neither a GPU nor a target, or kernels are interpreted in this process.
    """
    if target is None and not torch.cuda.is_available():
        raise RuntimeError("tune: this Python sees no CUDA GPU; --dry-run --target sm_90 prunes without one")
    if target is not None and target not in TARGETS:
        raise ValueError(f"tune: target must be one of {', '.join(TARGETS)}; got {target}")
    chosen = list(_SMALL) if small else units(ops, dtypes)
    gpu = chip() if target is None else chip_of(TARGETS[target])
    compiled_for = target_of(gpu) if target is None else TARGETS[target]
    report = report or order.newest(gpu.name)
    needs = order.needs(report) if report else {}
    map_ = workers.map if workers else lambda function, items: list(map(function, items))
    found = map_(partial(decisions_of, gpu=gpu, target=compiled_for), chosen)
    every = distinct(order.by_need([decision for of_unit in found for decision in of_unit], needs))
    if small:
        every, most = [next(decision for decision in every if decision.variants is kind) for kind in (True, False)], 3
    done = {} if again else tuned_file.load(out / f"{gpu.name}.json")
    left = [decision for decision in every if decision.bucket not in done.get(decision.choice, {})]
    pruned = map_(partial(prune.prune, gpu=gpu, factor=factor, most=most), left)
    return SearchPlan(gpu, compiled_for, left, len(every) - len(left), dict(zip(left, pruned, strict=True)), needs)


def search(
    todo: SearchPlan, rows: list[DecisionResult], seconds: float, *, workers: Workers, out: Path | None = None,
    ended: Callable[[DecisionResult], object] = lambda row: None, done: Iterable[str] = (), marker: Path | None = None,
    now: Callable[[], float] = time.monotonic,
) -> None:  # fmt: skip
    """Fill the rows of a plan in turn, until the time is over.

    Args:
        out: folder to which settings are written, after each problem; None to compile alone.
        ended: called with each row that is done.
        done, marker: see bench.units.each.

    Raises:
        DeviceLost: a launch left the GPU unusable; the row says so.
    """
    if seconds <= 0:
        return
    end = now() + (seconds - CLOSING if seconds > 2 * CLOSING else seconds / 2)
    done = set(done)
    by_name = {str(row.decision): row for row in rows if str(row.decision) not in done}
    clock = None if out is None else clock_for("cuda")
    warmed = todo.firsts if out is not None else set()  # all of a unit's launches, for it is run to be timed
    compilers = workers.compile(
        CandidateTask(row.decision, s, todo.gpu, todo.target)
        for row in by_name.values()
        for s in (*todo.pruned[row.decision].estimated, *([None] if row.decision in warmed else []))
    )
    reached = 0

    def work(decision: Decision) -> None:
        nonlocal reached
        work_on(by_name[str(decision)], todo, compilers, clock, out, end, len(by_name) - reached, now)
        reached += 1
        ended(by_name[str(decision)])

    def fail(decision: Decision, reason: str) -> None:
        by_name[str(decision)].failure = f"failed: {reason}"
        ended(by_name[str(decision)])

    with suppress(TimeoutError):  # what follows could not be compiled in time either
        each(
            todo.decisions, work, fail, done=done, marker=marker, budget=end - now(), patience=_PATIENCE, now=now
        )  # fmt: skip


def work_on(
    row: DecisionResult,
    todo: SearchPlan,
    compilers: Compilers,
    clock: Clock | None,
    out: Path | None,
    end: float,
    left: int,
    now: Callable[[], float],
) -> None:
    """Compile, and with a clock time and write, one problem of those ``left``.

    Raises:
        TimeoutError: the time is over.
        DeviceLost: a launch left the GPU unusable.
    """
    candidates = todo.pruned[row.decision].estimated
    row.default = candidates[0]
    compiled = [compilers.result(row.decision, s, end - now()) for s in candidates]
    kept = prune.by_compile(compiled, row.default, todo.target.shared_per_program)
    row.compiled = len(kept)
    row.compile_seconds = sum(c.seconds for c in compiled)
    row.registers = max(c.registers for c in compiled if c.settings in kept)
    if clock is None or out is None:
        return
    if row.decision in todo.firsts:
        compilers.result(row.decision, None, end - now())
    if now() >= end:
        raise TimeoutError
    until = min(end, now() + _FAIR * (end - now()) / left)
    try:
        row.outcome = time_decision(row.decision, kept, clock, until, now)
    except TimeoutError:
        row.failure = "not timed: its share of the time was over"
    except Unknown as error:
        row.failure = f"not timed: {error}"
    except Exception as error:  # of the default itself
        row.failure = f"failed: {one_line(error)}"
        check_device(one_line(error))
    else:
        tuned_file.add(
            out / f"{todo.gpu.name}.json", todo.gpu.name, row.decision, tuned_file.entry(row.outcome, row.default)
        )


class Unknown(RuntimeError):
    """The right result is not known, so nothing can be timed."""


def time_decision(
    decision: Decision, kept: list[tuple], clock: Clock, until: float, now: Callable[[], float]
) -> Fastest:
    """The fastest of the settings, the first of which is the default. What is wrong is not timed.

    Settings must have the results of the default. Variants must have those of PyTorch's own op: one way says
    nothing about another.

    Raises:
        Wrong: the default variant is wrong.
        Unknown: there is no memory for PyTorch's own result.
        Exception: the default cannot be launched.
    """
    device = "cpu"
    if torch.cuda.is_available():
        device = "cuda"
        torch.cuda.empty_cache()  # the last problem's tensors had other sizes
    arrays = arrays_of(decision.unit, device)
    if decision.variants:
        try:
            want = by_torch(decision.unit, arrays)
        except torch.cuda.OutOfMemoryError as error:
            raise Unknown("PyTorch's own result does not fit the memory") from error
        call: Callable[[tuple], Callable] = partial(whole_call, decision, arrays=arrays, want=want)
        samplers: dict[Hashable, Sampler] = {kept[0]: clock.sampler(call(kept[0]))}
    else:
        replay, want = launches_of(decision, kept[0], arrays)
        samplers = {kept[0]: clock.sampler(replay)}
        call = lambda settings: launches_of(decision, settings, arrays, want)[0]  # noqa: E731
    refused = []
    for settings in kept[1:]:
        if now() >= until:
            break
        try:
            samplers[settings] = clock.sampler(call(settings))
        except torch.cuda.OutOfMemoryError:
            break  # no room for more candidates' results
        except Exception as error:  # wrong, or it cannot be launched: not a candidate
            refused.append(f"{tuple(settings)}: {type(error).__name__}: {error}".splitlines()[0])
    timed = len(samplers)
    return fastest(samplers, kept[0], until, now)._replace(timed=timed, refused=tuple(refused))
