"""Which pictures the page of `primer-fast report` has, drawn into a folder."""

from pathlib import Path

from primer_fast.bench import history
from primer_fast.bench.op import FORWARD, FORWARD_BACKWARD
from primer_fast.bench.report import ProgramRow, Report
from primer_fast.bench.results import Results
from primer_fast.bench.verdicts import newest_ops, newest_programs
from primer_fast.cli import report_plots

PROGRAMS = {
    "mlp": "MLP training step", "cnn": "CNN training step", "nanogpt": "GPT training step",
    "gpt2": "GPT-2 124M training step", "dpo": "DPO step", "ppo": "PPO step", "generation": "text generation",
    "loss_head": "loss head", "call": "call of an op",
}  # fmt: skip


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
        drawn(f"programs {machine}", f"programs-{machine}", report_plots.programs, kept, _labels(kept), title)
    for found in newest_ops(results):
        report, where = found.content, found.machine
        device = report.header["device"]
        for precision in report.header["ceilings"]["tflops"]:
            drawn(f"roofline {found.path} {precision}", f"roofline-{where}-{precision}", report_plots.roofline, report,
                  precision, f"{precision} on {device}")  # fmt: skip
            for pass_name in (FORWARD, FORWARD_BACKWARD):
                drawn(
                    f"speedups {found.path} {precision} {pass_name}",
                    f"speedups-{where}-{precision}-{pass_name.replace('+', '-')}", report_plots.speedups, report,
                    precision, pass_name, f"Others beside ours, {pass_name}, {precision}, {device}",
                )  # fmt: skip
    for machine, reports in runs_of_ops(results).items():
        series = history.relative_times(reports)
        title = f"Our time on {reports[-1].header['device']}, run by run"
        drawn(f"history {machine}", f"history-{machine}", report_plots.history, series, title,
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
