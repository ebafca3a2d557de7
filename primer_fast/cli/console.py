"""What the commands share of the terminal: progress, and how numbers are printed."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


class Display:
    """Progress bars, one for each task; without a terminal a line at each tenth of a task; nothing if ``quiet``.

    Work goes on where nothing can be shown any more, as on a terminal that was closed. ``closed`` says that whatever
    read the lines, as `head` does, has gone: a reason to stop.

    >>> with Display() as display:
    ...     advance = display.task("training", total=100)
    ...     advance(10, "loss 2.1")
    """

    def __init__(self, console: Console | None = None, *, quiet: bool = False):
        self.console = console or Console(highlight=False, soft_wrap=True, quiet=quiet)
        self.closed = self.drawn = False
        self.bars = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=12), TaskProgressColumn(),
            TextColumn("{task.fields[note]}"), TimeRemainingColumn(compact=True), console=self.console,
        )  # fmt: skip

    def __enter__(self) -> "Display":
        if self.console.is_terminal:
            with self._shown():
                self.bars.start()
                self.drawn = True
        return self

    def __exit__(self, *exception) -> None:
        if self.drawn:
            with self._shown():
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
        with self._shown():
            self.console.print(text, markup=False)

    @contextlib.contextmanager
    def _shown(self) -> Iterator[None]:
        try:
            yield
        except SystemExit:  # of a pipe: from primer_fast.cli.terminal, or rich's own
            self.closed = self.console.quiet = True
        except OSError:
            self.console.quiet = True


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
