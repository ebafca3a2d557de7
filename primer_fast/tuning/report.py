"""The search in lines of text, for the terminal and for the summary of a GPU run."""

from collections.abc import Iterable

from primer_fast.tuning.session import DecisionResult, SearchPlan

COLUMNS = ("choice", "buckets", "candidates", "legal", "by estimate", "by compile")


def counts(rows: Iterable[DecisionResult]) -> list[list[str]]:
    """A line for each choice and one for all; "by compile" has those that were reached, of how many."""
    lines: dict[str, list[int]] = {}
    for row in rows:
        for name in (row.decision.choice, "all"):
            line = lines.setdefault(name, [0] * 6)
            reached = row.compiled is not None
            numbers = (1, row.candidates, row.legal, row.estimated, row.compiled or 0, row.estimated * reached)
            lines[name] = [a + b for a, b in zip(line, numbers, strict=True)]
    total = lines.pop("all", [0] * 6)
    return [_cells(name, line) for name, line in (*sorted(lines.items()), ("all", total))]


def _cells(name: str, line: list[int]) -> list[str]:
    *stages, compiled, of = line
    by_compile = "-" if of == 0 else f"{compiled:,}" if of == stages[-1] else f"{compiled:,} of {of:,}"
    return [name, *(f"{n:,}" for n in stages), by_compile]


def text(lines: list[list[str]]) -> str:
    """A table in columns as wide as they must be."""
    table = [list(COLUMNS), *lines]
    widths = [max(len(line[i]) for line in table) for i in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in table
    )


def line(row: DecisionResult) -> str:
    """One problem: what became of it."""
    stages = " > ".join("-" if n is None else str(n) for n in (row.candidates, row.legal, row.estimated, row.compiled))
    found = ""
    if row.outcome is not None and row.default is not None and row.outcome.settings != row.default:
        found = f"  {tuple(row.outcome.settings)} for {tuple(row.default)}"
    return f"{row.decision}  {stages}  {row.status}{found}"


def closing(todo: SearchPlan, rows: list[DecisionResult], seconds: float, jobs: int) -> str:
    """How far it came, in a sentence or two."""
    reached = [row for row in rows if row.compiled is not None]
    timed = [row for row in rows if row.outcome is not None]
    faster = [row for row in rows if row.outcome is not None and row.outcome.settings != row.default]
    compiled = sum(row.estimated for row in reached)
    work = sum(row.compile_seconds for row in reached)
    parts = [f"{todo.gpu.name}: {len(reached)} of {len(rows)} buckets compiled in {seconds:.0f} s"]
    parts += [f"{compiled:,} candidates, {work:.0f} s in {jobs} processes"] if compiled else []
    parts += [f"{todo.skipped} stood there already"] if todo.skipped else []
    parts += [f"{len(timed)} timed, {len(faster)} faster than the default"] if timed else []
    failed = [row for row in rows if row.failure]
    parts += [f"{len(failed)} not timed or failed"] if failed else []
    return "; ".join(parts)
