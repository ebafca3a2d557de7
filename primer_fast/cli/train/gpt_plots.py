"""Pictures of a transformer on text: its loss, where its heads look, its positions, its embeddings."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from primer_fast.cli.plots import BLUES, INK, MUTED, SIDES, TEST, TRAIN, curve, picture

SIGNS = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "←", "": "∅"}
KINDS = (  # what a token begins with, its colour
    ("lower case", str.islower, TRAIN),
    ("upper case", str.isupper, TEST),
    ("digits", str.isdigit, "#6d28d9"),
    ("other signs", lambda c: True, MUTED),
)
HEADS = 8  # the most heads of a layer, and layers, that are drawn
POSITIONS, DIMENSIONS = 128, 128  # the most that are drawn


def visible(token: str) -> str:
    """A token with visible signs for white space, and for characters that the font lacks."""
    if token in SIGNS:
        return SIGNS[token]
    return "".join(SIGNS.get(c) or (c if c.isprintable() and _font().get_char_index(ord(c)) else "�") for c in token)


@functools.cache
def _font():
    """The font of the pictures, to ask for which characters it has a glyph."""
    return get_font(findfont("DejaVu Sans"))


def curves(path: Path, rows: list[dict], title: str, unit: str) -> None:
    """Training and validation loss against steps, and the learning rate."""
    with picture(path, 9, 3.8, title) as figure:
        loss, rate = figure.subplots(1, 2, width_ratios=(3, 2))
        for key, colour, name in (("train/loss", TRAIN, "training"), ("validation/loss", TEST, "validation")):
            curve(loss, rows, key, colour, name + ", {:.3f} at the end", dots=key == "validation/loss")
        loss.set(xlabel="optimizer step", ylabel=f"mean loss (nats per {unit})")
        loss.legend(loc="upper right")
        curve(rate, rows, "train/learning_rate", MUTED, "")
        rate.set(xlabel="optimizer step", ylabel="learning rate")
        rate.set_ylim(bottom=0)
        rate.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        for axes in (loss, rate):
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.margins(x=0.02)


def attention(path: Path, weights: Sequence[np.ndarray], names: list[str], title: str) -> None:
    """A map for every head of each layer's weights (H, T, T): a line per query shows its weights of the keys."""
    weights = [layer[:HEADS] for layer in weights[:HEADS]]
    lines, columns = len(weights), max(map(len, weights))
    side = max(1.8, 0.13 * len(names))
    turned = max(map(len, names)) > 2
    width, height = columns * side + 0.9, lines * (side + 0.5 + 0.4 * turned) + 0.5
    heading = f"{title}: a line per token, dark where it looks at the token of the column"
    with picture(path, width, height, heading) as figure:
        grid = figure.subplots(lines, columns, squeeze=False)
        for i, j in np.ndindex(lines, columns):
            axes = grid[i, j]
            axes.imshow(np.sqrt(weights[i][j]), cmap=BLUES, vmin=0, vmax=1)  # the root makes small weights visible
            axes.set_title(f"layer {i + 1}, head {j + 1}", fontsize=9, fontweight="normal", loc="center")
            axes.set_xticks(
                range(len(names)), names, fontsize=8, color=INK, parse_math=False, rotation=90 if turned else 0
            )
            axes.set_yticks(
                range(len(names)), names if j == 0 else [""] * len(names), fontsize=8, color=INK, parse_math=False
            )
            axes.tick_params(length=0, pad=2)
            axes.grid(False)


def positions(path: Path, table: np.ndarray, kind: str) -> None:
    """What is added at each position (lines) to each dimension (columns) of the embedding, table (P, W)."""
    some = table[:POSITIONS, :DIMENSIONS]
    bound = np.abs(some).max()
    with picture(path, 9, 4.6, f"Positional encoding, {kind}") as figure:
        image, waves = figure.subplots(1, 2, width_ratios=(3, 2))
        drawn = image.imshow(some, cmap=SIDES, vmin=-bound, vmax=bound, aspect="auto", interpolation="nearest")
        image.set(xlabel="dimension", ylabel="position")
        image.grid(False)
        figure.colorbar(drawn, ax=image, fraction=0.04).outline.set_visible(False)
        for dimension, colour in zip(_some_dimensions(table.shape[1]), (TRAIN, TEST, MUTED), strict=False):
            waves.plot(some[:, dimension], color=colour, lw=1.4, label=f"dimension {dimension}")
        waves.set(xlabel="position", title="three of its columns")
        waves.legend(loc="upper left", bbox_to_anchor=(-0.1, -0.13), ncols=3, fontsize=8, columnspacing=1)
        if kind == "sinusoidal":
            width = table.shape[1]
            angle = rf"(t\,/\,10000^{{\,2i/{width}}})"
            formula = rf"$P_{{t,2i}} = c\,\sin{angle},\quad P_{{t,2i+1}} = c\,\cos{angle}$"
            image.set_title(f"{formula},  c = {bound:.3g}", fontweight="normal", fontsize=10)


def _some_dimensions(width: int) -> list[int]:
    """A fast, a middling and a slow wave of those that are drawn."""
    last = min(width, DIMENSIONS) - 1
    return sorted({0, last // 6 // 2 * 2, last // 3 // 2 * 2})


def embeddings(path: Path, rows: np.ndarray, names: list[str], unit: str) -> None:
    """The embeddings (N, W) of N tokens in the plane that shows most of their variance (PCA), each by its name."""
    flat, share = principal_plane(rows)
    with picture(path, 8, 6.4) as figure:
        axes = figure.subplots()
        left = set(range(len(names)))
        for kind, belongs, colour in KINDS:
            chosen = sorted(i for i in left if belongs(names[i].lstrip("␣")[:1]))
            left -= set(chosen)
            for i in chosen:
                x, y = flat[i]
                axes.text(
                    x, y, names[i], color=colour, ha="center", va="center", fontsize=9, clip_on=True, parse_math=False
                )
            if chosen:
                axes.scatter([], [], color=colour, s=22, label=kind)
        low, high = flat.min(axis=0), flat.max(axis=0)
        margin = 0.05 * np.maximum(high - low, 1e-12)
        axes.set(xlim=(low[0] - margin[0], high[0] + margin[0]), ylim=(low[1] - margin[1], high[1] + margin[1]))
        axes.set(xlabel=f"first direction, {share[0]:.0%} of the variance", ylabel=f"second, {share[1]:.0%}")
        axes.set_title(f"Embeddings of the {len(names)} most frequent {unit}s, projected to a plane")
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.1), ncols=4)


def principal_plane(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows (N, W) in the two directions of most variance, (N, 2), and the share of it that each has, (2,)."""
    centred = rows - rows.mean(axis=0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    flat = np.zeros((len(rows), 2))
    flat[:, : min(2, len(s))] = (u * s)[:, :2]
    share = np.zeros(2)
    share[: min(2, len(s))] = (s**2 / max((s**2).sum(), 1e-30))[:2]
    return flat, share
