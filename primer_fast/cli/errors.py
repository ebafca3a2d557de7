"""What is said of an error that a user can mend: one line, whatever raised it, and the exit status."""

import contextlib
import re
import sys
from collections.abc import Iterator

from primer_fast.cli import interruption

_SIGNS = re.compile(  # of what torch raises where a size is beyond memory, or beyond 64 bits
    "can't allocate memory|out of memory|Storage size calculation overflowed|Overflow when unpacking"
    "|integer multiplication overflow|without overflow"
)
_PLACE = re.compile(r"^\[enforce fail at [^]]*\] [^.]*\. ")  # in torch's own sources


class WriteError(OSError):
    """A file of a run cannot be written; the message names it and says why and what to do."""


class SizeError(ValueError):
    """What was asked for is larger than this machine's memory or its integers hold."""


# What ends a command without a traceback: tyro's exits, signals, and what the user can mend.
EXPECTED = (SystemExit, KeyboardInterrupt, FloatingPointError, ValueError, OSError, ModuleNotFoundError)


def report_end(command: str, error: BaseException, *, hint: str = "", failure: type[Exception] = WriteError) -> int:
    """Say in one line why ``command`` ended, by one of the ``EXPECTED`` errors; return its exit status.

    That is 1 where its work failed and 2 where the call was wrong; after a signal 128 and its number.

    Args:
        hint: what the user is to know of a command that was interrupted.
        failure: an error of the work, besides training that diverged and files that cannot be written.
    """
    if isinstance(error, SystemExit):  # tyro has printed the help, or what is wrong with the arguments
        return error.code if isinstance(error.code, int) else 2
    if isinstance(error, KeyboardInterrupt):
        print(f"interrupted{hint}", file=sys.stderr)
        return interruption.status(error)
    print(f"primer-fast {command}: {one_line(error).removeprefix(f'{command}: ')}", file=sys.stderr)
    return 1 if isinstance(error, FloatingPointError | WriteError | failure) else 2


@contextlib.contextmanager
def sizes_that_fit() -> Iterator[None]:
    """Turn the errors of sizes that are too large into a SizeError, a ValueError that says so in one line."""
    import torch  # here: whoever imports this module may not need it

    try:
        yield
    except (MemoryError, OverflowError, torch.OutOfMemoryError) as error:
        raise SizeError(_too_large(error)) from error
    except (RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, SizeError) or not _SIGNS.search(str(error)):
            raise
        raise SizeError(_too_large(error)) from error


def _too_large(error: BaseException) -> str:
    first = next(iter(str(error).splitlines()), "")
    return "a size is too large for this machine: " + (_PLACE.sub("", first) or type(error).__name__)


@contextlib.contextmanager
def refused_calls() -> Iterator[None]:
    """Turn a RuntimeError into a ValueError: the call asks for what cannot be had in this process."""
    try:
        yield
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def one_line(error: BaseException) -> str:
    """The message of an error without its line ends, and with half characters as escapes, which no stream refuses."""
    message = str(error).encode(errors="backslashreplace").decode()
    return " ".join(filter(None, map(str.strip, message.splitlines())))
