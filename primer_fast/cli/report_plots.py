"""Pictures of what was measured: rooflines, other providers beside ours, whole programs, history."""

import math
from datetime import datetime
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from primer_fast.bench.op import COMPILED, EAGER, FORWARD, OURS
from primer_fast.bench.report import OK, ProgramRow, Report
from primer_fast.bench.roofline import attainable, points, ridge
from primer_fast.cli.plots import INK, MUTED, STYLE, TEST, TRAIN

STYLE = STYLE | {"figure.dpi": 150}
OTHERS = ("#7a5195", "#2a9d8f", "#b5893a", "#c2457c", "#4c6a92", "#6b8e23")  # peers, after eager and torch.compile
FIXED = {OURS: (TRAIN, "o"), EAGER: (MUTED, "s"), COMPILED: (TEST, "^")}
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")


PEER = "other providers"  # in the roofline, where each would have too few points to be told apart


def marks_of(providers: list[str]) -> dict[str, tuple[str, str]]:
    """Colour and mark: ours blue, eager grey, torch.compile orange, the others in the order met."""
    rest = [name for name in dict.fromkeys(providers) if name not in FIXED]
    return FIXED | {name: (OTHERS[i % len(OTHERS)], "DvP"[i // len(OTHERS) % 3]) for i, name in enumerate(rest)}


def roofline(path: Path, report: Report, precision: str, title: str) -> bool:
    """A panel for each op; filled marks are the forward, hollow ones a backward. False where nothing can be drawn."""
    found = points(report, precision)
    if not found:
        return False
    copy, product = report.header["ceilings"]["copy_gbps"], report.header["ceilings"]["tflops"][precision]
    ops = list(dict.fromkeys(point.op for point in found))
    kinds = FIXED | {PEER: ("#a58bc0", "D")}
    columns = min(2, len(ops))
    rows = math.ceil(len(ops) / columns)
    low = min(min(point.intensity for point in found), ridge(copy, product)) / 2
    high = max(max(point.intensity for point in found), ridge(copy, product)) * 2
    with rc_context(STYLE):
        figure = Figure(figsize=(5.2 * columns, 3.3 * rows + 0.9))
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        panels = figure.subplots(rows, columns, squeeze=False).flat
        for op, axes in zip(ops, panels, strict=False):
            roof = [low, ridge(copy, product), high]
            axes.plot(roof, [attainable(x, copy, product) for x in roof], color=INK, lw=1.3)
            for point in sorted((point for point in found if point.op == op), key=lambda p: p.provider == OURS):
                colour, marker = kinds.get(point.provider, kinds[PEER])
                axes.plot(
                    point.intensity, point.tflops, marker, color=colour, ms=5.5 if point.provider == OURS else 4, mew=1,
                    mfc=colour if point.pass_name == FORWARD else "none", zorder=3 if point.provider == OURS else 2,
                )  # fmt: skip
            axes.set(xscale="log", yscale="log", xlim=(low, high), title=op)
            axes.set(xlabel="operations per byte of the op (FLOP/byte)", ylabel="reached (TFLOP/s)")
            axes.xaxis.set_major_formatter(PLAIN)
            axes.yaxis.set_major_formatter(PLAIN)
        for axes in list(panels):
            axes.set_visible(False)
        there = {point.provider if point.provider in kinds else PEER for point in found}
        marks = [_mark(name, *kind) for name, kind in kinds.items() if name in there]
        ceiling = f"ceilings: copy {copy:,.0f} GB/s, product {product:,.3g} TFLOP/s ({precision})"
        marks.append(Line2D([], [], color=INK, lw=1.3, label=ceiling))
        figure.legend(handles=marks, loc="outside lower left", ncols=5, fontsize=9, frameon=False)
        figure.savefig(path)
    return True


def _mark(name, colour, marker):
    return Line2D([], [], marker=marker, color=colour, ls="none", ms=5, label=name)


def speedups(path: Path, report: Report, precision: str, pass_name: str, title: str) -> bool:
    """For every case, how many times as long as ours each other provider takes. False where nothing can be drawn."""
    rows = [
        row
        for row in report.rows
        if row.provider == OURS and row.status == "ok" and row.versus
        and (row.precision, row.pass_name) == (precision, pass_name)
    ]  # fmt: skip
    if not rows:
        return False
    kinds = marks_of([name for row in rows for name in row.versus])
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 1.7 + 0.24 * len(rows)))
        axes = figure.subplots()
        axes.axvline(1, color=INK, lw=1.2)
        for y, row in enumerate(rows):
            for name, ratio in row.versus.items():
                axes.plot(ratio, y, kinds[name][1], color=kinds[name][0], ms=5, alpha=0.9)
        axes.set_yticks(range(len(rows)), [f"{row.op} · {row.case}" for row in rows], fontsize=8.5)
        axes.set(xscale="log", title=title, ylim=(len(rows) - 0.4, -0.6))
        _ratio_axis(axes)
        axes.set_xlabel("its time over ours (times; to the right of 1 ours is faster)")
        shown = [name for name in kinds if any(name in row.versus for row in rows)]
        marks = [_mark(name, *kinds[name]) for name in shown]
        figure.legend(handles=marks, loc="outside lower left", ncols=4, fontsize=9)
        figure.savefig(path)
    return True


def _ratio_axis(axes) -> None:
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(PLAIN)
    axes.xaxis.set_minor_formatter(NullFormatter())


def programs(path: Path, comparisons: list[list[ProgramRow]], labels: list[str], title: str) -> bool:
    """Whole programs beside ours, quartiles as lines, a bar where a target asks for. False where there is none."""
    drawn = [
        (f"{label}\n{trial.provider}", trial)
        for label, comparison in zip(labels, comparisons, strict=True)
        for trial in comparison
        if trial.status == OK and trial.provider != OURS and trial.versus is not None
    ]
    if not drawn:
        return False
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 1.3 + 0.46 * len(drawn)))
        axes = figure.subplots()
        axes.axvline(1, color=INK, lw=1.2)
        for y, (_, trial) in enumerate(drawn):
            met = all(target["met"] for target in trial.targets)
            colour = (TRAIN if met else TEST) if trial.targets else MUTED
            axes.plot([trial.versus_low, trial.versus_high], [y, y], color=colour, lw=2, alpha=0.5)
            axes.plot(trial.versus, y, "o", color=colour, ms=6)
            axes.annotate(f"{trial.versus:.2f}", (max(trial.versus, trial.versus_high), y), (6, 0),
                          textcoords="offset points", va="center", fontsize=8.5, color=colour)  # fmt: skip
        axes.set_yticks(range(len(drawn)), [label for label, _ in drawn], fontsize=8.5)
        axes.set(xscale="log", title=title, ylim=(len(drawn) - 0.4, -0.8))
        _ratio_axis(axes)
        axes.set_xlabel(
            "its time over ours (times; to the right of 1 ours is faster)\n"
            "blue: a target, met; orange: a target, missed; grey: no target\nlines: quartiles of the turns"
        )
        figure.savefig(path)
    return True


def history(path: Path, series: dict[str, list[tuple[str, float]]], title: str, ylabel: str) -> bool:
    """A line for each name through the runs' dates. False where no name has two."""
    series = {name: runs for name, runs in series.items() if len(runs) > 1}
    if not series:
        return False
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 3.8))
        axes = figure.subplots()
        axes.axhline(1, color=INK, lw=1)
        shades = [TRAIN, TEST, *OTHERS, MUTED]
        for i, (name, runs) in enumerate(series.items()):
            dates, values = zip(*runs, strict=True)
            when: Any = [datetime.fromisoformat(date) for date in dates]
            axes.plot(
                when, values, marker="o", ms=4, lw=1.4, label=name,
                color=shades[i % len(shades)], ls="-" if i < len(shades) else "--",
            )  # fmt: skip
        locator = AutoDateLocator()
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
        axes.set(title=title, ylabel=ylabel, xlabel="date of the run (UTC)")
        figure.legend(loc="outside right upper", fontsize=8.5)
        figure.savefig(path)
    return True
