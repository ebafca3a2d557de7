"""What the commands share that work an example out, number by number: ``primer-fast show <name>``."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from matplotlib.axes import Axes
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from primer_fast.cli.plots import INK, MUTED, frame

Example = TypeVar("Example")


def show(
    picture: Path, example: Example, report: Callable[[Example, Console], None], draw: Callable[[Path, Example], None],
    columns: int,
) -> int:  # fmt: skip
    """Print the example to a terminal of ``columns`` or more, and draw it; -> exit status."""
    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, columns)
    report(example, console)
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw(picture, example)
    console.print(f"drawn in {picture}", markup=False)
    return 0


def side_by_side(*named: tuple[str, str], lines: tuple[str, ...] = ()) -> Table:
    """Texts in columns under their names, and what their lines are called before them."""
    table = Table(box=box.SIMPLE_HEAD)
    if lines:
        table.add_column("", no_wrap=True, justify="right")
    for name, _ in named:
        table.add_column(name, no_wrap=True)
    table.add_row(*(["\n".join(lines)] if lines else []), *(text for _, text in named))
    return table


def draw_numbers(axes: Axes, t: Tensor, text: Callable[[float], str], size: int, **colours) -> None:
    """A matrix as coloured cells with their numbers; ``colours`` are imshow's, and -inf has none."""
    axes.imshow(t.masked_fill(t == -math.inf, math.nan).numpy(), **colours)
    for i, row in enumerate(t.tolist()):
        for j, value in enumerate(row):
            colour = MUTED if value == -math.inf else INK
            axes.text(j, i, text(value), ha="center", va="center", color=colour, size=size)
    frame(axes)
