"""The pictures of `primer-fast report`: rooflines, other providers beside ours, whole programs, history."""

import math
from datetime import datetime
from pathlib import Path
from typing import Any

from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from primer_fast.bench import history as bench_history
from primer_fast.bench.op import COMPILED, EAGER, FORWARD, FORWARD_BACKWARD, OURS
from primer_fast.bench.report import OK, ProgramRow, Report
from primer_fast.bench.results import Results
from primer_fast.bench.roofline import attainable, points, ridge
from primer_fast.bench.stages.verdicts import newest_ops, newest_programs
from primer_fast.cli.plots import INK, MUTED, TEST, TRAIN, picture

DPI = 150
OTHERS = ("#7a5195", "#2a9d8f", "#b5893a", "#c2457c", "#4c6a92", "#6b8e23")  # peers, after eager and torch.compile
FIXED = {OURS: (TRAIN, "o"), EAGER: (MUTED, "s"), COMPILED: (TEST, "^")}
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")
PROGRAMS = {
    "mlp": "MLP training step", "cnn": "CNN training step", "nanogpt": "GPT training step",
    "gpt2": "GPT-2 124M training step", "dpo": "DPO step", "ppo": "PPO step", "generation": "text generation",
    "loss_head": "loss head", "call": "call of an op",
}  # fmt: skip
PEER = "other providers"  # in the roofline, where each would have too few points to be told apart


def pictures(results: Results, folder: Path) -> dict[str, Path]:
    """Draw what there is to draw into ``folder``; by key, the files made."""
    made = {}

    def drawn(key: str, name: str, draw, *arguments) -> None:
        path = folder / f"{name}.png"
        if draw(path, *arguments):
            made[key] = path

    newest = newest_programs(results)
    for machine in dict.fromkeys(machine for machine, _, _ in newest):
        mine = [comparison for (where, _, _), (_, comparison) in newest.items() if where == machine]
        kept = [comparison for comparison in mine if not comparison[0].name.startswith("call of ")]
        header = next(found.content.header for (where, _, _), (found, _) in newest.items() if where == machine)
        title = f"Whole programs beside ours, {header['device']}"
        drawn(f"programs {machine}", f"programs-{machine}", programs, kept, _labels(kept), title)
    for found in newest_ops(results):
        report, where = found.content, found.machine
        device = report.header["device"]
        for precision in report.header["ceilings"]["tflops"]:
            drawn(f"roofline {found.path} {precision}", f"roofline-{where}-{precision}", roofline, report,
                  precision, f"{precision} on {device}")  # fmt: skip
            for pass_name in (FORWARD, FORWARD_BACKWARD):
                drawn(
                    f"speedups {found.path} {precision} {pass_name}",
                    f"speedups-{where}-{precision}-{pass_name.replace('+', '-')}", speedups, report,
                    precision, pass_name, f"Others beside ours, {pass_name}, {precision}, {device}",
                )  # fmt: skip
    for machine, reports in runs_of_ops(results).items():
        series = bench_history.relative_times(reports)
        title = f"Our time on {reports[-1].header['device']}, run by run"
        drawn(f"history {machine}", f"history-{machine}", history, series, title,
              "time over that of the first run (lower is faster)")  # fmt: skip
    return made


def program(name: str) -> str:
    """What a comparison of that name is called on the page."""
    return PROGRAMS.get(name, name)


def _labels(comparisons: list[list[ProgramRow]]) -> list[str]:
    """Each comparison's name, with what tells it from others of that name."""
    names = [comparison[0].name for comparison in comparisons]
    labels = []
    for comparison, name in zip(comparisons, names, strict=True):
        twins = [other[0].setting.split(", ") for other in comparisons if other[0].name == name]
        own = [part for part in comparison[0].setting.split(", ") if any(part not in twin for twin in twins)]
        labels.append(", ".join([program(name), *own]))
    return labels


def runs_of_ops(results: Results) -> dict[str, list[Report]]:
    """By machine, the reports of ops where there is more than one, oldest first."""
    runs: dict[str, list[Report]] = {}
    for found in results.ops:
        runs.setdefault(found.machine, []).append(found.content)
    return {machine: reports for machine, reports in runs.items() if len(reports) > 1}


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
    with picture(path, 5.2 * columns, 3.3 * rows + 0.9, title, DPI) as figure:
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
    with picture(path, 9, 1.7 + 0.24 * len(rows), dpi=DPI) as figure:
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
    with picture(path, 9, 1.3 + 0.46 * len(drawn), dpi=DPI) as figure:
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
    return True


def history(path: Path, series: dict[str, list[tuple[str, float]]], title: str, ylabel: str) -> bool:
    """A line for each name through the runs' dates. False where no name has two."""
    series = {name: runs for name, runs in series.items() if len(runs) > 1}
    if not series:
        return False
    with picture(path, 9, 3.8, dpi=DPI) as figure:
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
    return True
