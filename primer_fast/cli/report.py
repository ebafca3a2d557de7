"""``primer-fast report``: one page of everything measured, from what is committed under bench/results."""

import datetime
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import triton
from rich.console import Console

from primer_fast.bench import results
from primer_fast.bench.environment import commit
from primer_fast.bench.verdicts import verdicts
from primer_fast.cli import report_page, report_pictures
from primer_fast.cli.console import Display
from primer_fast.cli.options.report import parse
from primer_fast.cli.run_folder import write_text
from primer_fast.proof.production import cases_to_compile, compile_units


def main(argv: list[str]) -> int:
    """Run the command; 0 if the page was written, 2 for a wrong call."""
    try:
        options = parse(argv)
    except SystemExit as leave:  # --help, or an unknown option, which tyro has explained
        return leave.code if isinstance(leave.code, int) else 2
    try:
        if not options.results.is_dir() and options.results != results.FOLDER:
            raise ValueError(f"report: results must be a folder; got {options.results}")
        if options.out.is_dir():
            raise ValueError(f"report: out must be a file; got the folder {options.out}")
        found = results.read(options.results)
        if options.compile:
            found = replace(found, compiled={"compiled now": compiled(options.jobs)})
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            folder = options.pictures or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            drawn = report_pictures.pictures(found, folder)
            write_text(options.out, report_page.page_of(found, verdicts(found), drawn, commit()))
    except (OSError, ValueError, RuntimeError) as error:
        print(f"primer-fast {error}", file=sys.stderr)
        return 2
    for name, reason in found.unreadable.items():
        print(f"not readable: {name}: {reason}", file=sys.stderr)
    kept = f", pictures in {options.pictures}" if options.pictures else ""
    print(f"{options.out}: {len(found.ops)} reports of ops, {len(found.programs)} of whole programs{kept}")
    return 0


def compiled(jobs: int) -> dict:
    """Rows of all production cases in bfloat16 on sm_90, compiled now, and what compiled them."""
    units, rows = cases_to_compile(dtypes=["bfloat16"]), []
    with Display(Console(stderr=True, highlight=False)) as display:
        advance = display.task("compiling", total=len(units))
        for done, (unit, made) in enumerate(zip(units, compile_units(units, jobs), strict=True), 1):
            rows += [row.as_dict() for row in made]
            advance(done, f"{unit.op} {unit.case}")
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"triton": triton.__version__, "torch": torch.__version__, "date": now, "commit": commit(), "rows": rows}
