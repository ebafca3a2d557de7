"""What a command writes to may show fewer characters than it prints, or be gone: neither is an error of the command."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO, cast

CLOSED = 128 + 13  # the status that a shell gives a program which SIGPIPE ended


class OutputClosed(SystemExit):
    """Nobody reads what is printed any more, as after `| head`; an end of the program that needs no message."""

    def __init__(self) -> None:
        super().__init__(CLOSED)


class _Output:
    """A text stream whose writes raise OutputClosed once its reader has gone."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._watched():
            return self._stream.write(text)

    def writelines(self, lines: list[str]) -> None:
        with self._watched():
            self._stream.writelines(lines)

    def flush(self) -> None:
        with self._watched():
            self._stream.flush()

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            # What is left in the buffer has to go somewhere when Python shuts down.
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "w", encoding="utf-8") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())
            raise OutputClosed from None


def run(command: Callable[[], int]) -> int:
    """The status of ``command``, with standard streams that show ``?`` for what their encoding lacks; 141 if closed."""
    with contextlib.ExitStack() as after:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name) or after.enter_context(open(os.devnull, "w", encoding="utf-8"))
            _lenient(stream, after)
            after.callback(setattr, sys, name, getattr(sys, name))
            setattr(sys, name, cast(TextIO, _Output(stream)))
        try:
            status = command()
            sys.stdout.flush()
            sys.stderr.flush()
        except OutputClosed:
            return CLOSED
        return status


@contextlib.contextmanager
def first_of_machine() -> Iterator[None]:
    """Inside it only the first process of a machine prints, of several that torchrun started there."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        yield
        return
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def _lenient(stream: Any, after: contextlib.ExitStack) -> None:
    """Until ``after`` closes, let the stream print ``?`` for what it cannot encode, instead of raising an error."""
    before = getattr(stream, "errors", None)
    if before in ("strict", "surrogateescape") and hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="replace")
        after.callback(stream.reconfigure, errors=before)
