"""``primer-fast tune``: search this GPU's fastest launch settings, or without one see what would be tried."""

import sys
from itertools import count

from rich import box
from rich.console import Console
from rich.table import Table

from primer_fast.bench.units import LOST
from primer_fast.cli.console import Display
from primer_fast.cli.options.tune import parse
from primer_fast.tuning import report, session
from primer_fast.tuning.compile import Workers
from primer_fast.tuning.job import Job, Request

_WIDTH = 150  # where the output is not a terminal


def main(argv: list[str]) -> int:
    """Run the command; its exit status is that of tuning/__main__.py."""
    try:
        options = parse(argv)
    except SystemExit as leave:  # --help, or an unknown option, which tyro has explained
        return leave.code if isinstance(leave.code, int) else 2
    with Workers(options.jobs) as workers:
        try:
            job = Job(Request(**vars(options)), workers)
        except (ValueError, RuntimeError, OSError) as error:
            print(f"primer-fast {error}", file=sys.stderr)
            return 2
        with Display(Console(stderr=True, highlight=False)) as display:
            advance = display.task("tuning", total=max(1, len(job.rows)))
            ended = count(1)
            status = job.search(lambda row: advance(next(ended), f"{row.decision} {row.status}"))
    console = Console(highlight=False)
    console.width = console.width if console.is_terminal else _WIDTH
    _show(job.rows, console)
    console.print(job.closing(), markup=False, soft_wrap=True)
    if status == LOST:
        print("the GPU was lost: call it again", file=sys.stderr)
    return status


def _show(rows: list[session.DecisionResult], console: Console) -> None:
    table = Table(title="candidates", title_justify="left", box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for i, name in enumerate(report.COLUMNS):
        table.add_column(f"  {name}" if i else name, justify="right" if i else "left", no_wrap=True)
    lines = report.counts(rows)
    for line in lines[:-1]:
        table.add_row(*line)
    table.add_section()
    table.add_row(*lines[-1], style="bold")
    console.print(table)
    for row in rows:
        if row.failure or (row.outcome is not None and row.outcome.settings != row.default):
            console.print(report.line(row), markup=False, soft_wrap=True, style="red" if row.failure else None)
