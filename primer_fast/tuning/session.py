"""One search: problems in order of importance, pruned, compiled, timed and written within a number of minutes."""

import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from primer_fast.bench.timing import Clock, clock_for
from primer_fast.bench.units import DeviceLost
from primer_fast.kernels.launch import Chip, chip
from primer_fast.kernels.tunable import TUNED
from primer_fast.proof.targets import TARGETS, Target, target_of
from primer_fast.tuning import prune, tuned_file
from primer_fast.tuning.compile import Compilers, Task, chip_of, compiling
from primer_fast.tuning.problems import Site, arrays_of, sites, units
from primer_fast.tuning.replay import launches_of
from primer_fast.tuning.search import Outcome, Sampler, fastest

_CLOSING = 10.0  # seconds kept for ending
_FAIR = 4.0  # times its even share of the time that one problem may take


@dataclass
class Row:
    """What became of one problem; counts of candidates, None for stages that it did not reach."""

    site: Site
    candidates: int
    legal: int
    estimated: int
    compiled: int | None = None
    compile_seconds: float = 0.0
    registers: int = 0  # the most of those left
    outcome: Outcome | None = None
    default: tuple | None = None
    failure: str | None = None

    @property
    def gain(self) -> float | None:
        """Time of the default over that of the settings found."""
        return None if self.outcome is None else self.outcome.default_seconds / self.outcome.seconds

    @property
    def status(self) -> str:
        if self.failure is not None:
            return self.failure
        if self.outcome is None:
            return "not compiled" if self.compiled is None else "compiled"
        return f"{self.gain:.2f} x" if self.outcome.settings != self.default else "default"


@dataclass
class Plan:
    """What there is to do."""

    gpu: Chip
    target: Target
    sites: list[Site]
    skipped: int  # problems whose buckets have an entry already
    pruned: dict[Site, prune.Pruned]

    @property
    def firsts(self) -> set[Site]:
        """The first problem of each unit."""
        return set({site.unit: site for site in reversed(self.sites)}.values())

    @property
    def candidates(self) -> int:
        """What is to be compiled."""
        return sum(len(pruned.estimated) for pruned in self.pruned.values())


def plan(
    ops: Iterable[str] = (), dtypes: Iterable[str] = (), *, target: str | None = None, out: Path = TUNED,
    again: bool = False, factor: float = prune.FACTOR, most: int = prune.MOST,
) -> Plan:  # fmt: skip
    """Find the problems and prune by what needs no compiler.

    Args:
        target: name of one of TARGETS, to compile for without a GPU; None for the GPU of this machine.
        out: folder of the files; buckets that stand there are left out unless ``again``.
        factor, most: see prune.by_estimate.

    Raises:
        ValueError: an op, a dtype or the target is unknown.
        RuntimeError: there is neither a GPU nor a target, or kernels are interpreted in this process.
    """
    if target is None and not torch.cuda.is_available():
        raise RuntimeError("tune: this Python sees no CUDA GPU; --dry-run --target sm_90 prunes without one")
    if target is not None and target not in TARGETS:
        raise ValueError(f"tune: target must be one of {', '.join(TARGETS)}; got {target}")
    chosen = units(ops, dtypes)
    gpu = chip() if target is None else chip_of(TARGETS[target])
    compiled_for = target_of(gpu) if target is None else TARGETS[target]
    every = sites(chosen, gpu, compiled_for)
    done = {} if again else tuned_file.load(out / f"{gpu.name}.json")
    left = [site for site in every if str(site.bucket) not in done.get(site.choice, {})]
    pruned = {site: prune.prune(site, gpu, factor, most) for site in left}
    return Plan(gpu, compiled_for, left, len(every) - len(left), pruned)


def search(
    todo: Plan, seconds: float, *, jobs: int, out: Path | None = None, now: Callable[[], float] = time.monotonic
) -> Iterator[Row]:
    """A row of each problem in turn, until the time is over; rows that were not reached come at the end as they are.

    Args:
        out: folder to which settings are written, after each problem; None to compile alone.
    """
    end = now() + max(0.0, seconds - _CLOSING if seconds > 2 * _CLOSING else seconds / 2)
    clock = None if out is None else clock_for("cuda")
    rows = [Row(site, *todo.pruned[site][:2], len(todo.pruned[site].estimated)) for site in todo.sites]
    warmed = todo.firsts if out is not None else set()  # all of a unit's launches, for it is run to be timed
    tasks = [
        Task(site, s, todo.gpu, todo.target)
        for site in todo.sites
        for s in (*todo.pruned[site].estimated, *([None] if site in warmed else []))
    ]
    reached = 0
    if seconds > 0:
        with compiling(tasks, jobs) as compilers:
            for row in rows:
                try:
                    work_on(row, todo, compilers, clock, out, end, (len(rows) - reached), now)
                except (TimeoutError, DeviceLost):  # what follows could not be timed either
                    break
                reached += 1
                yield row
    yield from rows[reached:]


def work_on(
    row: Row, todo: Plan, compilers: Compilers, clock: Clock | None, out: Path | None, end: float, left: int,
    now: Callable[[], float],
) -> None:  # fmt: skip
    """Compile, and with a clock time and write, one problem of those ``left``.

    Raises:
        TimeoutError: the time is over.
        DeviceLost: a launch left the GPU unusable.
    """
    candidates = todo.pruned[row.site].estimated
    row.default = candidates[0]
    compiled = [compilers.result(row.site, s, end - now()) for s in candidates]
    kept = prune.by_compile(compiled, row.default, todo.target.shared_per_program)
    row.compiled = len(kept)
    row.compile_seconds = sum(c.seconds for c in compiled)
    row.registers = max(c.registers for c in compiled if c.settings in kept)
    if clock is None or out is None:
        return
    if row.site in todo.firsts:
        compilers.result(row.site, None, end - now())
    if now() >= end:
        raise TimeoutError
    until = min(end, now() + _FAIR * (end - now()) / left)
    try:
        row.outcome = time_site(row.site, kept, clock, until, now)
    except TimeoutError:
        row.failure = "not timed: its share of the time was over"
    except Exception as error:  # of the default itself
        row.failure = f"failed: {type(error).__name__}: {error}".splitlines()[0]
        _check_device()
    else:
        tuned_file.add(
            out / f"{todo.gpu.name}.json", todo.gpu.name, row.site, tuned_file.entry(row.outcome, row.default)
        )


def _check_device() -> None:
    """DeviceLost where the GPU takes no more work in this process."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError as error:
        raise DeviceLost(str(error)) from error


def time_site(site: Site, kept: list[tuple], clock: Clock, until: float, now: Callable[[], float]) -> Outcome:
    """The fastest of the settings, the first of which is the default, whose results are those that all must have."""
    device = "cpu"
    if torch.cuda.is_available():
        device = "cuda"
        torch.cuda.empty_cache()  # the last problem's tensors had other sizes
    arrays = arrays_of(site.unit, device)
    replay, want = launches_of(site, kept[0], arrays)
    samplers: dict[Hashable, Sampler] = {kept[0]: clock.sampler(replay)}
    for settings in kept[1:]:
        if now() >= until:
            break
        try:
            samplers[settings] = clock.sampler(launches_of(site, settings, arrays, want)[0])
        except torch.cuda.OutOfMemoryError:
            break  # no room for more candidates' results
        except Exception:
            continue  # wrong, or it cannot be launched: not a candidate
    return fastest(samplers, kept[0], until, now)
