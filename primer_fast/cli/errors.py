"""What is said of an error that a user can mend: one line, whatever raised it."""

import contextlib
import re
from collections.abc import Iterator

import torch

_SIGNS = re.compile(  # of what torch raises where a size is beyond memory, or beyond 64 bits
    "can't allocate memory|out of memory|Storage size calculation overflowed|Overflow when unpacking"
    "|integer multiplication overflow|without overflow"
)
_PLACE = re.compile(r"^\[enforce fail at [^]]*\] [^.]*\. ")  # in torch's own sources


class SizeError(ValueError):
    """What was asked for is larger than this machine's memory or its integers hold."""


@contextlib.contextmanager
def sizes_that_fit() -> Iterator[None]:
    """Turn the errors of sizes that are too large into a SizeError, a ValueError that says so in one line."""
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


def one_line(error: BaseException) -> str:
    """The message of an error without its line ends, and with half characters as escapes, which no stream refuses."""
    message = str(error).encode(errors="backslashreplace").decode()
    return " ".join(filter(None, map(str.strip, message.splitlines())))
