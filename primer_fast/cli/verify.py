"""``primer-fast verify``: every case of every op, forward and each gradient, kernel against NumPy."""

import json
import os

import torch
from rich import box
from rich.console import Console
from rich.table import Table

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported, below

from primer_fast import __version__
from primer_fast.cli.console import Display
from primer_fast.cli.errors import refused_calls
from primer_fast.cli.options.verify import parse
from primer_fast.cli.run.folder import write_text
from primer_fast.proof import verify

_WIDTH = 120  # where the output is not a terminal


def main(argv: list[str]) -> int:
    """Run the command; 0 if every result is within its budget, 1 if one is not."""
    options = parse(argv)
    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise ValueError(f"json must be a file in a folder that exists; got {options.json}")
    with refused_calls():
        plan = verify.cases_to_verify(options.ops, options.dtype, options.case)
    rows = []
    with Display(Console(stderr=True, highlight=False)) as display:
        advance = display.task("verifying", total=len(plan))
        for done, unit in enumerate(plan, 1):
            try:
                rows.append(verify.check(*unit))
            except ValueError as error:  # no wrong call, but a fault of the op: its traceback is wanted
                raise RuntimeError(f"{unit} could not be computed") from error
            advance(done, str(unit))
    console = Console(highlight=False)
    console.width = console.width if console.is_terminal else _WIDTH
    console.print(_table(rows, options.tensors))
    flat = [row for unit in rows for row in unit]
    failed = sum(not row.passed for row in flat)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "Triton's interpreter on the CPU"
    console.print(f"{len(flat)} results on {where}: {len(flat) - failed} within budget, {failed} not")
    if options.json is not None:
        versions = {"primer_fast": __version__, "torch": torch.__version__, "where": where}
        write_text(options.json, json.dumps({**versions, "rows": [row.as_dict() for row in flat]}, indent=1) + "\n")
    return 1 if failed else 0


def _table(units: list[list[verify.VerifiedTensor]], every: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for name in ("op", "case", "dtype", "operands by", "worst tensor" if not every else "tensor"):
        table.add_column(name, no_wrap=True)
    for name in ("error", "budget", "of budget", "PyTorch's error"):
        table.add_column(f"  {name}", justify="right", no_wrap=True)
    for unit in units:
        failed = [row for row in unit if not row.passed]
        for row in unit if every else failed or [max(unit, key=lambda row: row.share)]:
            numbers = f"{row.error:.1e}", f"{row.budget:.1e}", f"{row.share:.0%}", f"{row.plain_error:.1e}"
            names = row.op, row.case, row.dtype, row.path, row.tensor
            table.add_row(*(f"{name}  " for name in names), *numbers, style=None if row.passed else "red")
    return table
