"""``primer-fast kernels``: compile the kernels for GPUs that need not be here, and list what their code needs."""

import datetime
import json
import shlex
from collections import Counter
from itertools import groupby

import torch
import triton
from rich import box
from rich.console import Console
from rich.table import Table

from primer_fast import __version__
from primer_fast.bench.environment import commit
from primer_fast.cli.console import Display
from primer_fast.cli.errors import refused_calls
from primer_fast.cli.options.kernels import parse
from primer_fast.cli.run.folder import write_text
from primer_fast.proof.hot_loop import HotLoop
from primer_fast.proof.production import CaseOnTarget, CompiledLaunch, cases_to_compile, compile_units
from primer_fast.proof.resources import Resources
from primer_fast.proof.targets import TARGETS

_WIDTH = 150  # where the output is not a terminal
_PASS = {"forward": "fwd", "backward": "bwd"}
_LEGEND = """\
grid: programs of the launch · tile: block sizes, / programs that share a reduction · w/s: warps, pipeline stages
regs: registers, + spilled bytes, per thread · KiB: shared memory of a program · fit: programs per processor
step: instructions in a step of the hot loop, the innermost with most matrix work · wait: after how many wgmma of a step
a warp waits for all products; ! ptxas makes it wait after each · epi: instructions for an element of a tile once its
products are complete · matrix: wgmma of a step, S with both operands in shared memory, R with one in registers; other
instructions of tensor cores, loads and stores: as they stand in the code, a loop's once · TMA: tiles by descriptor
async: 16 bytes to shared memory · 16B: 16 bytes by registers · small: fewer than 16 bytes"""


def main(argv: list[str]) -> int:
    """Run the command; 0 if everything compiled, 1 if something did not."""
    options = parse(argv)
    if options.jobs < 1:
        raise ValueError(f"jobs must be at least 1; got {options.jobs}")
    if options.json is not None and (options.json.is_dir() or not options.json.absolute().parent.is_dir()):
        raise ValueError(f"json must be a file in a folder that exists; got {options.json}")
    rows = compile_rows(cases_to_compile(options.ops, options.case, options.dtype, options.target), options.jobs)
    console = Console(highlight=False)
    console.width = console.width if console.is_terminal else _WIDTH
    _show(rows, console)
    if options.json is not None:
        command = shlex.join(["primer-fast", "kernels", *argv])
        content = {**described(), "command": command, "rows": [row.as_dict() for row in rows]}
        write_text(options.json, json.dumps(content, indent=1) + "\n")
    return 1 if any(row.error for row in rows) else 0


def described() -> dict:
    """What made a table: versions, date and commit."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    versions = {"primer_fast": __version__, "triton": triton.__version__, "torch": torch.__version__}
    return {**versions, "date": now, "commit": commit()}


def compile_rows(units: list[CaseOnTarget], jobs: int) -> list[CompiledLaunch]:
    """Compile in ``jobs`` processes, with a progress bar.

    Raises:
        ValueError: this process interprets kernels, and cannot compile any.
    """
    rows = []
    with refused_calls(), Display(Console(stderr=True, highlight=False)) as display:
        advance = display.task("compiling", total=len(units))
        for done, (unit, compiled) in enumerate(zip(units, compile_units(units, jobs), strict=True), 1):
            rows.extend(compiled)
            advance(done, f"{unit.op} {unit.case} {unit.dtype} {unit.target}")
    return rows


def _show(rows: list[CompiledLaunch], console: Console) -> None:
    for (target, dtype, op), group in groupby(rows, key=lambda row: (row.target, row.dtype, row.op)):
        console.print(_table(list(group), target, dtype, op))
    failed = [row for row in rows if row.error]
    for row in failed:
        launch = " ".join((row.target, row.dtype, row.op, row.case, row.direction, row.kernel))
        console.print(f"{launch}: {row.error}", style="red", markup=False, soft_wrap=True)
    spilling = sum(row.resources is not None and row.resources.spills for row in rows)
    console.print(_LEGEND, style="dim", markup=False)
    console.print(
        f"{len(rows)} launches: {len(rows) - len(failed)} compiled, {len(failed)} failed, {spilling} spill, "
        f"{sum(bool(row.serialized) for row in rows)} with serialised products"
    )


def _table(rows: list[CompiledLaunch], target: str, dtype: str, op: str) -> Table:
    chip = TARGETS[target]
    table = Table(
        title=f"{op} · {dtype} · {target} ({chip.gpu}: {chip.processors} processors, "
        f"{chip.shared_per_program // 1024} KiB shared memory for a program)",
        title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0, pad_edge=False,
    )  # fmt: skip
    for name in ("case", "pass", "kernel"):
        table.add_column(name, no_wrap=True)
    for name in ("grid", "tile", "w/s", "regs", "KiB", "fit", "step", "wait", "epi"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("matrix", "loads", "stores"):
        table.add_column(f" {name}", no_wrap=True)
    for case, group in groupby(rows, key=lambda row: row.case):
        for i, row in enumerate(group):
            table.add_row(case if i == 0 else "", *_cells(row))
        table.add_section()
    return table


def _cells(row: CompiledLaunch) -> list[str]:
    kernel = row.kernel.removeprefix("attention_").removeprefix(f"{row.op}_").removesuffix("_kernel")
    blocks = [str(v) for name, v in row.constexprs.items() if name.startswith("BLOCK")]
    splits = row.constexprs.get("SPLITS", 1)
    tile = "x".join(blocks) + (f" /{splits}" if splits != 1 else "")
    cells = [_PASS[row.direction], kernel, f"{row.programs:,}", tile, f"{row.warps}/{row.stages or '-'}"]
    r = row.resources
    if row.error or r is None:
        return [*cells, "[red]failed[/red]", *[""] * 8]
    spill = f"[red]+{r.spill_bytes or f'{r.spill_instructions} ops'}[/red]" if r.spills else ""
    memory = [f"{r.registers}{spill}", f"{r.shared_bytes / 1024:.0f}", str(r.programs_per_processor)]
    step = ["" if r.hot_loop is None else str(r.hot_loop.instructions), _waits(row, r.hot_loop)]
    epilogue = "" if row.epilogue is None else f"{row.epilogue:.1f}"
    counts = (f" {counts}" for counts in (_matrix(r), _counts(r.loads), _counts(r.stores)))
    return [*cells, *memory, *step, epilogue, *counts]


def _waits(row: CompiledLaunch, loop: HotLoop | None) -> str:
    wgmma = loop is not None and loop.from_shared + loop.from_registers > 0
    waits = str(loop.waits) if loop is not None and wgmma else ""
    return f"[red]{waits}![/red]" if row.serialized else waits


def _matrix(r: Resources) -> str:
    kinds = {} if r.hot_loop is None else {"S": r.hot_loop.from_shared, "R": r.hot_loop.from_registers}
    step = " ".join(f"{n}{kind}" for kind, n in kinds.items() if n)
    return step or _counts(r.matrix) or (f"FFMA {r.ffma}" if r.ffma else "")


_WORDS = {"tma": "TMA", "async wide": "async", "wide": "16B", "async narrow": "small", "narrow": "small"}


def _counts(counts: dict[str, int]) -> str:
    """{"tma": 8, "narrow": 1} -> "TMA 8 small 1"."""
    words: Counter[str] = Counter()
    for name in sorted(counts, key=[*_WORDS, *counts].index):
        words[_WORDS.get(name, name)] += counts[name]
    return " ".join(f"{word} {n}" for word, n in words.items())
