"""Pictures of a convolutional network: its kernels, its feature maps of one image, what max-pool keeps."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle

from primer_fast.cli.plots import BLUES, INK, MUTED, SIDES, TEST, TRAIN, frame, picture

COLUMNS, ROWS = 16, 8  # the most tiles across, and down
STEP = 1.15  # from a tile to the next, in widths of a tile
INCHES = 0.58  # width of a tile


def kernels(path: Path, weights: list[np.ndarray], title: str) -> None:
    """The kernels (O, C, K, K) of each convolution; those over several channels in a line for each output channel."""
    with _lines(path, title, [_line_count(w) for w in weights]) as (figure, places):
        for i, (axes, w) in enumerate(zip(places, weights, strict=True), 1):
            heading = f"convolution {i}: {w.shape[0]} kernels over {w.shape[1]} input {_plural('channel', w.shape[1])}"
            if w.shape[1] == 1:
                tiles = w[: ROWS * COLUMNS, 0]
                heading += f", the first {len(tiles)}" if len(tiles) < len(w) else ""
            else:
                some = w[:ROWS, :COLUMNS]
                tiles = some.reshape(-1, *w.shape[2:])
                heading += f"; a line per kernel, the first {len(some)}, with its first {some.shape[1]} channels"
            bound = max(np.abs(tiles).max(), 1e-12)
            columns = COLUMNS if w.shape[1] == 1 else some.shape[1]
            drawn = _mosaic(axes, tiles, columns, SIDES, -bound, bound)
            axes.set_title(heading, fontsize=10, fontweight="normal")
            bar = figure.colorbar(drawn, ax=axes, fraction=0.02, aspect=12, ticks=[-bound, 0, bound], format="%.2f")
            bar.outline.set_visible(False)


def _line_count(w: np.ndarray) -> int:
    return min(ROWS, len(w) if w.shape[1] > 1 else -(-len(w) // COLUMNS))


def feature_maps(path: Path, maps: dict[str, np.ndarray], probability: np.ndarray, truth: int, title: str) -> None:
    """The first 32 maps of each layer, (C, H, W), for one image, and the probabilities (classes,) that come of them."""
    with _lines(path, title, [min(2, -(-len(m) // COLUMNS)) for m in maps.values()], last=1.7) as (_, places):
        for axes, (name, images) in zip(places, maps.items(), strict=False):
            count, height, width = images.shape
            tiles = images[: 2 * COLUMNS]
            shown = f", the first {len(tiles)}" if count > len(tiles) else ""
            axes.set_title(
                f"{name}: {count} {_plural('map', count)} of {height} x {width}{shown}",
                fontsize=10,
                fontweight="normal",
            )
            low, high = min(0.0, images.min()), max(images.max(), 1e-12)
            _mosaic(axes, tiles, COLUMNS, "gray_r" if name == "input" else BLUES, low, high)
        axes = places[-1]
        bars = axes.bar(range(len(probability)), probability, color=MUTED, width=0.7)
        bars[int(probability.argmax())].set_color(TRAIN if probability.argmax() == truth else TEST)
        axes.set(ylim=(0, 1.15), ylabel="probability", xticks=range(len(probability)), yticks=(0, 0.5, 1))
        axes.set_title(f"answer: {probability.argmax()} ({probability.max():.1%}); the digit is a {truth}", fontsize=10)
        axes.grid(False)


@contextmanager
def _lines(path: Path, title: str, counts: list[int], last: float | None = None) -> Iterator[tuple[Figure, list[Axes]]]:
    """A picture with axes for each number of lines of tiles, and for a ``last`` part of so many inches."""
    heights = [0.35 + INCHES * STEP * n for n in counts] + ([last] if last else [])
    with picture(path, INCHES * STEP * COLUMNS, 0.5 + sum(heights), title) as figure:
        yield figure, list(figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])


def _mosaic(axes: Axes, tiles: np.ndarray, columns: int, colours, low: float, high: float) -> AxesImage:
    """Images (N, H, W) in lines of ``columns``, on one axes: one for each would take seconds to lay out."""
    height = tiles.shape[1] / tiles.shape[2]
    for i, tile in enumerate(tiles):
        x, y = i % columns * STEP, -(i // columns) * height * STEP
        extent = (x, x + 1, y - height, y)
        drawn = axes.imshow(tile, cmap=colours, vmin=low, vmax=high, extent=extent, interpolation="nearest")
        axes.add_patch(Rectangle((x, y - height), 1, height, fill=False, edgecolor=MUTED, linewidth=0.5))
    lines = -(-len(tiles) // columns)
    axes.set(xlim=(-0.02, COLUMNS * STEP), ylim=(-(lines - 1) * height * STEP - height - 0.02, 0.02), anchor="W")
    axes.axis("off")
    return drawn


def max_pool(
    path: Path, image: np.ndarray, before: np.ndarray, after: np.ndarray, kept: np.ndarray, pool: int, title: str
) -> None:
    """The image, a feature map (H, W) with the ``kept`` positions h * W + w marked, the pooled map (OH, OW)."""
    with picture(path, 11, 4.6, title) as figure:
        first, left, right = figure.subplots(1, 3, width_ratios=(1, 2, 2))
        _tile(first, image, "gray_r", 0, image.max())
        height, width = before.shape
        low, high = min(0.0, before.min()), max(before.max(), 1e-12)
        _tile(left, before, BLUES, low, high)
        for line in range(after.shape[0] + 1):
            left.axhline(line * pool - 0.5, color=MUTED, lw=0.5)
        for column in range(after.shape[1] + 1):
            left.axvline(column * pool - 0.5, color=MUTED, lw=0.5)
        lines, columns = np.divmod(kept.ravel(), width)
        live = after.ravel() > low  # of a window of zeros the first is kept, which shows nothing
        left.scatter(columns[live], lines[live], s=9, color=TEST, edgecolor="white", linewidth=0.4)
        drawn = _tile(right, after, BLUES, low, high)
        of = "its digit", f"feature map, {height} x {width}", f"max-pooled, {after.shape[0]} x {after.shape[1]}"
        for axes, words in zip((first, left, right), of, strict=True):
            axes.set_title(words, fontsize=10, fontweight="normal")
        left.set_xlabel(f"lines: windows of {pool} x {pool}; dots: what is kept of each", fontsize=9, color=INK)
        right.set_xlabel("the same, with a quarter of the numbers" if pool == 2 else "the same, smaller", fontsize=9)
        figure.colorbar(drawn, ax=right, fraction=0.046).outline.set_visible(False)


def _tile(axes: Axes, image: np.ndarray, colours, low: float, high: float) -> AxesImage:
    """One image without axes in a thin frame."""
    axes.set(xticks=[], yticks=[])
    frame(axes)
    return axes.imshow(image, cmap=colours, vmin=low, vmax=high)


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"
