"""Signals that ask a command to end: Ctrl-C, SIGTERM of SLURM and Kubernetes, SIGHUP of a terminal that closes."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence

ASKING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
# `timeout` and a closing terminal send one signal twice, and so do torchrun, which hands on what its processes may have
# had already, and SLURM beside it. Such copies are no second request.
COPIES, COPIES_OF_TORCHRUN = 1.0, 5.0  # seconds


class Stopped(KeyboardInterrupt):
    """A command ends because of signal ``number``."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


def status(stop: KeyboardInterrupt) -> int:
    """The conventional exit status after a signal: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + getattr(stop, "number", signal.SIGINT)


class _Handler:
    """Inside it ``first`` is called with the first of ``numbers`` that comes, and ``again`` with a later one."""

    numbers: Sequence[int] = ASKING

    def __enter__(self):
        self.number, self.since, self.process = 0, 0.0, os.getpid()
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            for number in self.numbers:
                before = signal.getsignal(number)
                # nohup has SIGHUP ignored, and that stands. A shell has SIGINT ignored in what it starts with &: there
                # `kill -INT` is meant. None: not a handler of Python's, and it could not be put back.
                if before is not None and (number == signal.SIGINT or before != signal.SIG_IGN):
                    self.before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception) -> None:
        for number, before in self.before.items():
            signal.signal(number, before)

    def _handle(self, number, frame) -> None:
        if os.getpid() != self.process:  # a process that was forked meanwhile
            _end_at_once(number)
        elif not self.number:
            self.number, self.since = number, time.monotonic()
            self.first(number)
        elif time.monotonic() - self.since >= _copies(number):
            self.again(number)

    def first(self, number: int) -> None:
        raise NotImplementedError

    def again(self, number: int) -> None:
        raise NotImplementedError


class Interruption(_Handler):
    """Inside it a signal only sets a flag, to be asked for between steps; a second one ends the program at once.

    Args:
        notify: called with what the user is to know.
    """

    def __init__(self, notify: Callable[[str], None]):
        self.notify = notify

    def first(self, number):
        again = "Ctrl-C again" if number == signal.SIGINT else "a second signal"
        # The terminal may be gone, or in the middle of a line.
        with contextlib.suppress(OSError, RuntimeError):
            self.notify(f"stopping after this step; {again} quits at once")

    def again(self, number):
        raise Stopped(number)

    def requested(self) -> bool:
        return self.number != 0

    def stop(self) -> Stopped:
        """What to end the program by."""
        return Stopped(self.number or signal.SIGINT)


class Ending(_Handler):
    """Inside it SIGTERM and SIGHUP end the program as Ctrl-C does: by an exception, so that it can clean up.

    Not in one of several processes: there such a wait may be for another one that is gone.
    """

    def __init__(self):
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            self.numbers = []
        else:
            self.numbers = [number for number in ASKING if number != signal.SIGINT]

    def first(self, number):
        raise Stopped(number)

    def again(self, number):
        _end_at_once(number)


def _copies(number: int) -> float:
    """For how many seconds after the first signal ``number`` is a copy of it."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return COPIES_OF_TORCHRUN
    return 0.0 if number == signal.SIGINT else COPIES


def _end_at_once(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
