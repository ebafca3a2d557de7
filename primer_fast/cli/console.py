"""What the commands share of the terminal: progress, interruption, how numbers are printed."""

import signal
import threading
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


class Display:
    """Progress bars, one a task; without a terminal a line at each tenth of a task; nothing where it is ``quiet``.

    >>> with Display() as display:
    ...     advance = display.task("training", total=100)
    ...     advance(10, "loss 2.1")
    """

    def __init__(self, console: Console | None = None, *, quiet: bool = False):
        self.console = console or Console(highlight=False, soft_wrap=True, quiet=quiet)
        self.bars = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=12), TaskProgressColumn(),
            TextColumn("{task.fields[note]}"), TimeRemainingColumn(compact=True), console=self.console,
        )  # fmt: skip

    def __enter__(self) -> "Display":
        if self.console.is_terminal:
            self.bars.start()
        return self

    def __exit__(self, *exception) -> None:
        if self.console.is_terminal:
            self.bars.stop()

    def task(self, name: str, total: int, completed: int = 0) -> Callable[[int, str], None]:
        """Begin a task of ``total`` steps; the function returned says how many are done, with a note."""
        if self.console.is_terminal:
            bar = self.bars.add_task(name, total=total, completed=completed, note="")

            def update(done: int, note: str = "") -> None:
                self.bars.update(bar, completed=done, note=note)

            return update
        tenth = completed * 10 // total

        def advance(done: int, note: str = "") -> None:
            nonlocal tenth
            if done * 10 // total > tenth:
                tenth = done * 10 // total
                self.print(f"{name} {done}/{total}  {note}")

        return advance

    def print(self, text: str) -> None:
        """A line above the bars."""
        self.console.print(text, markup=False)


class Interruption:
    """Inside it Ctrl-C only sets a flag, to be asked for between steps; a second Ctrl-C ends the program at once."""

    def __init__(self, notify: Callable[[], None]):
        self.notify, self.flag = notify, False

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *exception) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self.before)

    def _handle(self, number, frame) -> None:
        if self.flag:
            raise KeyboardInterrupt
        self.flag = True
        self.notify()

    def requested(self) -> bool:
        return self.flag


def summary(row: dict[str, float]) -> str:
    """A row of metrics in a few words: loss, accuracy, what was not trained on, speed."""
    words = [f"loss {row['train/loss'] if 'train/loss' in row else row['loss']:.4f}"]
    measured = (
        ("accuracy", "train/accuracy", ".2%"), ("test", "test/accuracy", ".2%"),
        ("validation", "validation/loss", ".4f"), ("accuracy", "accuracy", ".2%"),
        ("accuracy", "rewards/accuracies", ".2%"), ("score", "objective/scores", ".3f"), ("KL", "objective/kl", ".3f"),
    )  # fmt: skip
    for name, key, form in measured:
        if key in row:
            words.append(f"{name} {row[key]:{form}}")
    for key, unit in (("train/samples_per_second", "/s"), ("train/tokens_per_second", " tokens/s")):
        if key in row:
            words.append(f"{row[key]:,.0f}{unit}")
    return "  ".join(words)
