"""primer-fast show convolution: a 5 x 5 "0", a kernel that answers to horizontal edges, every number worked out."""

from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from primer_fast import functional as F
from primer_fast.cli.options.show.convolution import parse
from primer_fast.cli.plots import SIDES, picture
from primer_fast.cli.show import worked_example

IMAGE = [  # a "0": 1 where there is ink
    [0, 1, 1, 1, 0],
    [1, 0, 0, 0, 1],
    [1, 0, 0, 0, 1],
    [1, 0, 0, 0, 1],
    [0, 1, 1, 1, 0],
]
KERNEL = [  # horizontal edges: ink above counts for, ink below against
    [1, 1, 1],
    [0, 0, 0],
    [-1, -1, -1],
]
POOL, POOL_STRIDE = 2, 1  # a stride of 2 would leave one window of the 3 x 3 map
WINDOW = (0, 0)  # line and column of the window that the picture follows
CONVOLUTION, POOLING = "#b45309", "#6d28d9"  # frames: the window and its number; the pooled window and its number


@dataclass(frozen=True)
class ConvolutionExample:
    """Matrices of the example, as the library computes them."""

    image: Tensor  # (H, W)
    kernel: Tensor  # (K, K)
    convolved: Tensor  # (H - K + 1, W - K + 1)
    rectified: Tensor  # as convolved
    pooled: Tensor

    def patch(self, line: int, column: int) -> Tensor:
        """What of the image lies under the kernel for one output number."""
        return self.image[line : line + len(self.kernel), column : column + len(self.kernel)]


def compute() -> ConvolutionExample:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    image, kernel = (torch.tensor(rows, dtype=torch.float32, device=device) for rows in (IMAGE, KERNEL))
    x, w = image[None], kernel[None, None]  # (C, H, W), (O, C, R, S)
    rectified = F.conv2d(x, w, activation="relu")
    results = F.conv2d(x, w)[0], rectified[0], F.max_pool2d(rectified, POOL, POOL_STRIDE)[0]
    return ConvolutionExample(*(t.cpu() for t in (image, kernel, *results)))


def report(example: ConvolutionExample, console: Console) -> None:
    """The example in the terminal: the matrices, a line per output number, what ReLU and max-pool make of them."""
    console.print('A "0" of 5 x 5 pixels (1 is ink) and the kernel for horizontal edges:\n')
    console.print(worked_example.side_by_side(("image", matrix(example.image)), ("kernel", matrix(example.kernel))))
    console.print("The kernel slides over the image; each number is the sum of patch times kernel, place by place:\n")
    table = Table(box=box.SIMPLE_HEAD, show_lines=True)
    table.add_column("line, column", justify="center", no_wrap=True)
    for name in ("patch", "kernel", "products"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("their sum", justify="right", no_wrap=True, style="bold")
    for line, row in enumerate(example.convolved):
        for column, value in enumerate(row):
            patch = example.patch(line, column)
            cells = matrix(patch), matrix(example.kernel), products(patch, example.kernel)
            table.add_row(f"{line}, {column}", *cells, f"\n= {number(value)}")
    console.print(table)
    console.print(
        f"ReLU keeps what is positive; max-pool the largest of each {POOL} x {POOL}, moved by {POOL_STRIDE}:\n"
    )
    results = ("convolved", example.convolved), ("ReLU", example.rectified), ("max-pool", example.pooled)
    console.print(worked_example.side_by_side(*((name, matrix(t)) for name, t in results)))
    console.print(
        "A number is positive where the line above has more ink than the line below, negative where it has less: the\n"
        "top and bottom of the 0 answer with opposite signs; its upright sides, the same above and below, with 0.\n",
    )


def number(value: Tensor | float) -> str:
    return f"{float(value):g}"


def matrix(t: Tensor) -> str:
    """Lines of numbers, to the right."""
    return "\n".join(" ".join(f"{number(v):>2}" for v in row) for row in t)


def products(patch: Tensor, kernel: Tensor) -> str:
    """The sum of products in full, a line per line of the kernel: ``0*1 + 1*1 + 1*1``."""
    lines = []
    for pixels, weights in zip(patch, kernel, strict=True):
        terms = (f"{number(p)}*{number(w):>2}" for p, w in zip(pixels, weights, strict=True))
        lines.append(" + ".join(terms))
    return " +\n".join(lines) + "  "


def draw(path: Path, example: ConvolutionExample) -> None:
    """Image, kernel, result, ReLU and max-pool with their numbers; one window of each kind and its number framed."""
    panels = [
        ('image: a "0"', example.image), ("kernel", example.kernel), ("convolved", example.convolved),
        ("ReLU", example.rectified), (f"max-pool {POOL} x {POOL}", example.pooled),
    ]  # fmt: skip
    line, column = WINDOW
    patch = example.patch(line, column)
    by_lines = [(f"({number(a)})" if a < 0 else number(a)) for a in (patch * example.kernel).sum(dim=1)]
    working = f"framed: {' + '.join(by_lines)} = {number(example.convolved[line, column])}, line by line of the kernel"
    with picture(path, 12, 3.5, f'Horizontal edges of a "0"; {working}') as figure:
        widths = [t.shape[1] for _, t in panels]
        axes = figure.subplots(1, len(panels), width_ratios=widths)
        for panel, (name, t), sign in zip(axes, panels, ("", "*", "=", "→", "→"), strict=True):
            bound = max(3.0, t.abs().max().item()) * 1.3  # lighter than the darkest colour, so that numbers can be read
            worked_example.draw_numbers(panel, t, number, 13, cmap=SIDES, vmin=-bound, vmax=bound)
            panel.set(xticks=[], yticks=[])
            shape = "" if "x" in name else f", {t.shape[0]} x {t.shape[1]}"
            panel.set_title(name + shape, fontsize=10, loc="center")
            panel.text(-0.16 * 5 / t.shape[1], 0.5, sign, transform=panel.transAxes, ha="center", va="center", size=20)
        size = len(example.kernel)
        _frame(axes[0], line, column, size, CONVOLUTION)
        _frame(axes[1], 0, 0, size, CONVOLUTION)
        _frame(axes[2], line, column, 1, CONVOLUTION)
        _frame(axes[3], 0, 0, POOL, POOLING)
        _frame(axes[4], 0, 0, 1, POOLING)


def _frame(axes: Axes, line: int, column: int, size: int, colour: str) -> None:
    axes.add_patch(
        Rectangle((column - 0.5, line - 0.5), size, size, fill=False, edgecolor=colour, linewidth=3, clip_on=False)
    )


def main(argv: list[str]) -> int:
    return worked_example.show(parse(argv).out, compute(), report, draw, columns=80)
