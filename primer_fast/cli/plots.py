"""Pictures of a run, as PNG files; one style for all of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, StrMethodFormatter

INK, MUTED, GRID = "#1f2430", "#6b7280", "#e5e7eb"
TRAIN, TEST = "#2563a8", "#d9480f"  # blue and orange, told apart by every kind of colour vision
STYLE: dict[Any, Any] = {
    "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": MUTED, "axes.labelcolor": INK,
    "text.color": INK, "xtick.color": MUTED, "ytick.color": MUTED, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": GRID, "legend.frameon": False, "figure.constrained_layout.use": True,
}  # fmt: skip
BLUES = LinearSegmentedColormap.from_list("blues", ["#ffffff", "#c6dbef", TRAIN])
SIDES = LinearSegmentedColormap.from_list("sides", [TEST, "#fde8d8", "#ffffff", "#d6e6f4", TRAIN])


@contextmanager
def picture(path: Path, width: float, height: float, title: str | None = None, dpi: int = 110) -> Iterator[Figure]:
    """A figure of so many inches in the style of all, which is written to ``path`` at the end."""
    with rc_context(STYLE | {"figure.dpi": dpi}):
        figure = Figure(figsize=(width, height))
        if title is not None:
            figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        yield figure
        figure.savefig(path)


def curve(
    axes: Axes, rows: list[dict], key: str, colour: str, label: str, *, x: str = "step", scale: float = 1, dots=False
) -> None:
    """Metric ``key`` against ``x`` in the rows that have it; nothing where none has.

    ``{}`` in the label stands for the last value.
    """
    points = [(row[x], scale * row[key]) for row in rows if row.get(key) is not None]
    if points:
        marker = "o" if dots or len(points) == 1 else None
        label = label.format(points[-1][1])
        axes.plot(*zip(*points, strict=True), color=colour, label=label, marker=marker, ms=3.5, lw=1.4)


def frame(axes: Axes) -> None:
    """A thin line around an image instead of grid and spines."""
    axes.grid(False)
    for side in axes.spines.values():
        side.set(visible=True, color=MUTED, linewidth=0.5)


def curves(path: Path, rows: list[dict], title: str) -> None:
    """Loss and accuracy against epochs, in training and on the test set where it was measured."""
    with picture(path, 9, 3.6, title) as figure:
        loss, accuracy = figure.subplots(1, 2)
        for axes, key, scale in ((loss, "loss", 1), (accuracy, "accuracy", 100)):
            for part, colour, name in (("train", TRAIN, "training"), ("test", TEST, "test")):
                curve(axes, rows, f"{part}/{key}", colour, name, x="epoch", scale=scale, dots=part == "test")
            axes.set_xlabel("epoch (passes over the training data)")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.margins(x=0.02)
        loss.set(ylabel="mean loss per sample (nats)", yscale="log")
        loss.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        for part in ("major", "minor"):
            getattr(loss.yaxis, f"set_{part}_formatter")(StrMethodFormatter("{x:g}"))
        accuracy.set(ylabel="samples classified right (%)")
        accuracy.legend(loc="lower right")
        values = [100 * r[k] for r in rows for k in ("train/accuracy", "test/accuracy") if r.get(k) is not None]
        accuracy.set_ylim(max(0.0, _floor_of(values)), min(100.5, max(values) + 2))


def _floor_of(values: list[float]) -> float:
    """Where the accuracy axis starts: nine values in ten lie above, and the end of the curve can be read."""
    return 5 * np.floor((np.quantile(values, 0.1) - 5) / 5)


def confusion_matrix(path: Path, truth: np.ndarray, predicted: np.ndarray, names: list[str], title: str) -> None:
    """How many samples of each class (rows) were taken for each class (columns); the diagonal is right."""
    counts = np.zeros((len(names), len(names)), dtype=int)
    np.add.at(counts, (truth, predicted), 1)
    share = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    side = 2.6 + 0.42 * len(names)
    with picture(path, side + 0.6, side) as figure:
        axes = figure.subplots()
        axes.imshow(np.sqrt(share), cmap=BLUES, vmin=0, vmax=1)  # the root makes rare mistakes visible
        for (i, j), count in np.ndenumerate(counts):
            if count:
                axes.text(
                    j, i, f"{count}", ha="center", va="center", fontsize=9, color="white" if share[i, j] > 0.4 else INK
                )
        axes.set_xticks(range(len(names)), names)
        axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="predicted", ylabel="true")
        axes.set_title(
            f"{title}\n{np.trace(counts):,} of {counts.sum():,} right ({np.trace(counts) / counts.sum():.2%})"
        )
        axes.grid(False)


def mistakes(
    path: Path, images: np.ndarray, truth: np.ndarray, predicted: np.ndarray, confidence: np.ndarray, title: str
) -> None:
    """The images (N, H, W) taken for another class, most confident first; at most forty."""
    wrong = np.flatnonzero(truth != predicted)
    shown = wrong[np.argsort(-confidence[wrong], kind="stable")][:40]
    columns = 10
    rows = max(1, -(-len(shown) // columns))
    what = f", the {len(shown)} most confident" if len(shown) < len(wrong) else ""
    heading = f"{title}: {len(wrong):,} of {len(truth):,} wrong{what}\ntrue → predicted, confidence"
    with picture(path, 10, 0.7 + 1.35 * rows, heading) as figure:
        for cell, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
            axes.axis("off")
            if cell < len(shown):
                i = shown[cell]
                axes.imshow(images[i], cmap="gray_r")
                axes.set_title(
                    f"{truth[i]} → {predicted[i]}  {confidence[i]:.0%}", fontsize=9, fontweight="normal", loc="center"
                )


def decision_surface(
    path: Path, x: np.ndarray, y: np.ndarray, probability: np.ndarray, points: np.ndarray, truth: np.ndarray, *,
    labels: tuple[str, str], classes: tuple[str, str], title: str,
) -> None:  # fmt: skip
    """P(class 1) over a grid, x (W,), y (H,), probability (H, W), with the samples (N, 2) and their classes on it."""
    with picture(path, 7.2, 5.2) as figure:
        axes = figure.subplots()
        surface = axes.contourf(x, y, probability, levels=np.linspace(0, 1, 21), cmap=SIDES, alpha=0.6)
        if probability.min() < 0.5 < probability.max():
            axes.contour(x, y, probability, levels=[0.5], colors=INK, linewidths=1.2)
        for value, marker, colour in ((0, "X", TEST), (1, "o", TRAIN)):
            chosen = points[truth == value]
            axes.scatter(
                chosen[:, 0], chosen[:, 1], marker=marker, s=55, color=colour, edgecolor="white", linewidth=0.8,
                label=classes[value],
            )  # fmt: skip
        axes.set(xlabel=labels[0], ylabel=labels[1], title=title)
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.12), ncols=2)
        axes.grid(False)
        bar = figure.colorbar(surface, ax=axes, ticks=[0, 0.25, 0.5, 0.75, 1])
        bar.set_label(f"predicted probability of being {classes[1]}; the line is 0.5")
