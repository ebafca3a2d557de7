"""``primer-fast report``: one page of everything measured, from what is committed under bench/results."""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from primer_fast.bench import results
from primer_fast.bench.environment import commit
from primer_fast.bench.stages.verdicts import verdicts
from primer_fast.cli import kernels
from primer_fast.cli.options.report import parse
from primer_fast.cli.report import page as report_page
from primer_fast.cli.report import plots as report_plots
from primer_fast.cli.run.folder import write_text
from primer_fast.proof.production import cases_to_compile


def main(argv: list[str]) -> int:
    """Run the command; 0 if the page was written."""
    options = parse(argv)
    if not options.results.is_dir() and options.results != results.FOLDER:
        raise ValueError(f"results must be a folder; got {options.results}")
    if options.out.is_dir():
        raise ValueError(f"out must be a file; got the folder {options.out}")
    found = results.read(options.results)
    if options.compile:
        rows = kernels.compile_rows(cases_to_compile(dtypes=["bfloat16"]), options.jobs)
        now = kernels.described() | {"rows": [row.as_dict() for row in rows]}
        found = replace(found, compiled={"compiled now": now})
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.pictures or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        drawn = report_plots.pictures(found, folder)
        write_text(options.out, report_page.page_of(found, verdicts(found), drawn, commit()))
    for name, reason in found.unreadable.items():
        print(f"not readable: {name}: {reason}", file=sys.stderr)
    kept = f", pictures in {options.pictures}" if options.pictures else ""
    print(f"{options.out}: {len(found.ops)} reports of ops, {len(found.programs)} of whole programs{kept}")
    return 0
