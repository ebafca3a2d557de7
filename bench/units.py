"""Units of work, each tried once, over as many processes as it takes.

A kernel that reads past its memory takes the GPU from its process, and one that waits for ever takes the time. Either
costs one unit here: what it was is written down, the process ends with the status ``LOST``, and whoever started it
starts another, which goes on with the next unit.
"""

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, TypeVar

import torch

from primer_fast.bench import environment
from primer_fast.bench.report import Report, load

Unit = TypeVar("Unit")  # anything whose str() names it
FOREVER = threading.TIMEOUT_MAX  # the patience of a rehearsal, which may be as slow as its machine
LOST = 3  # exit status of a process that cannot go on


class DeviceLost(RuntimeError):
    """The GPU takes no more work in this process, so nothing after this can be measured in it."""


def one_line(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """Of an exception's message, cut short."""
    return (str(error).strip().splitlines() or [""])[0][:300]


def check_device(reason: str | None = None) -> None:
    """Wait for the GPU, if this process uses one, and give back the memory that an error left behind.

    Raises:
        DeviceLost: it takes no more work; the message is ``reason``, or what the GPU says now.
    """
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except Exception as lost:
        raise DeviceLost(reason or one_line(lost)) from lost


def leave(status: int) -> NoReturn:
    """End the process with the exit status of its ``main``.

    To take down what is on a lost GPU would end it with another, so the interpreter's shutdown is left out then.
    """
    if status == LOST:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def marker_of(path: Path) -> Path:
    """The marker of ``each`` beside a stage's file."""
    return path.with_suffix(".begun")


def resumed(path: Path, kind: str, header: dict) -> Report | None:
    """What an earlier process of the same run has left, or None; a file of another run is not gone on with.

    Args:
        header: of this run, see environment.same_run.
    """
    if not path.exists():
        return None
    try:
        found = load(path, kind)
        if environment.same_run(found.header, header):
            return found
        reason = f"{path} is of another machine, other code or other sizes"
    except ValueError as error:
        reason = str(error)
    print(f"bench: not resumed: {reason}", file=sys.stderr)
    marker_of(path).unlink(missing_ok=True)  # it is of that run too
    return None


def fill(
    report: Report,
    path: Path | None,
    units: Iterable[Unit],
    rows_of: Callable[[Unit], list],
    failed: Callable[[Unit, str], object],
    *,
    done: Iterable[str],
    after: Callable[[Unit, list], object] = lambda unit, rows: None,
    **options,
) -> bool:
    """Add the rows of each unit to a report, which is written to ``path`` after each -> whether the GPU still works.

    What had no time becomes the report's ``left_out``.

    Args:
        rows_of, failed: the rows of a unit, and the row that says why there are none.
        after: sees a unit and its rows when the report has them.
        options: see ``each``.
    """
    units, done = list(units), set(done)

    def record(unit: Unit, rows: list) -> None:
        done.add(str(unit))
        report.rows += rows
        if path is not None:
            report.save(path)
        after(unit, rows)

    report.left_out = []
    try:
        each(
            units, lambda unit: record(unit, rows_of(unit)), lambda unit, why: record(unit, [failed(unit, why)]),
            done=done, marker=path and marker_of(path), **options,
        )  # fmt: skip
        return True
    except DeviceLost as error:
        print(f"bench: the GPU was lost: {error}", file=sys.stderr)
        return False
    finally:
        report.left_out = [str(unit) for unit in units if str(unit) not in done]
        if path is not None:
            report.save(path)


def each(
    units: Iterable[Unit],
    work: Callable[[Unit], object],
    fail: Callable[[Unit, str], object],
    *,
    done: Iterable[str] = (),
    marker: Path | None = None,
    budget: float | None = None,
    expected: Callable[[Unit], float] | None = None,
    patience: float | Callable[[Unit], float] = 60.0,
    now: Callable[[], float] = time.monotonic,
) -> list[str]:
    """Call ``work(unit)`` for each unit in turn; return the names of those for which there was no time.

    Args:
        work: measures a unit and writes what it found. Errors that leave the GPU usable are its own business.
        fail: ``fail(unit, reason)`` writes that there is no result: the unit hung, or it took the process or the GPU
            along.
        done: names of units that an earlier process has tried.
        marker: a file that names the unit at work. Where an earlier process left one, it ended in that unit.
        budget: seconds for all. A unit is begun only if it would still end in time: by ``expected(unit)`` where that
            is given, else by the longest of the last six.
        patience: seconds, of all units or by unit, after which one counts as hung. Then ``fail`` is called and the
            process ends.

    Raises:
        DeviceLost: ``work`` raised it; ``fail`` has been called.
    """
    left, tried = list(units), set(done)
    if marker is not None and marker.exists():
        died = marker.read_text(encoding="utf-8")
        for unit in left:
            if str(unit) == died and died not in tried:
                fail(unit, "the process ended while it was at work")
                tried.add(died)
        marker.unlink(missing_ok=True)
    left = [unit for unit in left if str(unit) not in tried]
    begin, recent = now(), deque([0.0], maxlen=6)  # the last six: the very first unit also starts compilers
    passed: list[str] = []
    for number, unit in enumerate(left):
        started = now()
        if budget is not None and started - begin + (max(recent) if expected is None else expected(unit)) > budget:
            if expected is None:  # nor will any other fit
                return [str(other) for other in left[number:]]
            passed.append(str(unit))
            continue
        try:
            with _watched(unit, fail, marker, patience(unit) if callable(patience) else patience):
                work(unit)
        except DeviceLost as error:
            fail(unit, f"the GPU was lost: {error}")
            raise
        except KeyboardInterrupt:  # the time for the whole is over
            return passed + [str(other) for other in left[number:]]
        recent.append(now() - started)
    return passed


@contextmanager
def _watched(unit: Unit, fail: Callable, marker: Path | None, patience: float) -> Iterator[None]:
    """Inside, the marker names the unit, and a unit that does not end within ``patience`` ends the process."""

    def give_up() -> None:  # in a thread of its own: the unit's own thread may wait for the GPU for ever
        fail(unit, f"it had not ended after {patience:.0f} s")
        if marker is not None:
            marker.unlink(missing_ok=True)
        os._exit(LOST)

    if marker is not None:
        marker.write_text(str(unit), encoding="utf-8")
    watch = threading.Timer(patience, give_up)
    watch.daemon = True
    watch.start()
    try:
        yield
    finally:
        watch.cancel()
        if marker is not None:
            marker.unlink(missing_ok=True)
