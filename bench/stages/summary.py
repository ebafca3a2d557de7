"""summary.md of a GPU run: built from whatever files the stages have left so far.

It begins with the targets beside what was measured, goes on with what was wrong and with what had no time, and ends
with the tables.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from primer_fast.bench import tables
from primer_fast.bench.files import replace_text
from primer_fast.bench.op import OURS
from primer_fast.bench.report import (
    COMPILE,
    FAILED,
    FAST,
    KINDS,
    PROGRAMS,
    RIGHT,
    SANITIZER,
    TUNE,
    WRONG,
    Report,
    load,
)
from primer_fast.bench.stages import scoreboard, stages

BRIEF_CHARACTERS = 9_500  # of the page that is printed last: some callers keep only the end of what a command prints
_FAILURES, _WORST, _ROWS = 20, 8, 40  # lines of each kind on the brief page


class Names(NamedTuple):
    """Files of a run beside those of its stages."""

    page: str
    log: str


MEASURED, TUNED = Names("summary.md", "log.txt"), Names("tune.md", "tune.txt")


def save(out: Path, header: dict, outcomes: list, names: Names = MEASURED) -> None:
    """Write the page; a reader never sees half of it."""
    replace_text(out / names.page, text(out, header, outcomes, names))


def text(out: Path, header: dict, outcomes: list, names: Names = MEASURED, *, brief: bool = False) -> str:
    """The page; if brief, under 10,000 characters."""
    ran = {outcome.name for outcome in outcomes}
    found = {kind: _read(out / f"{kind}.json", kind) for kind in KINDS if kind in ran}
    most = _FAILURES if brief else None
    versions = ", ".join(
        f"{key} {header[key]}" for key in ("python", "torch", "triton", "cuda", "driver") if header.get(key)
    )
    where = f"{versions}, commit {header.get('commit') or '-'}, source {header.get('source') or '-'}, {header['date']}"
    ended = "\n".join(f"- {o.name}: {o.status}, {o.seconds:.0f} s" for o in outcomes) or "- nothing has run yet"
    parts = [f"# {header['device']}", where, ended, "## Targets", _targets(found)]
    parts += ["## Wrong", _lines(_wrong(found), most, "Nothing was wrong in what was checked.")]
    parts += ["## No time", _lines(_no_time(found, outcomes), most, "Nothing was left out.")]
    for name, content in found.items():
        parts += [f"## {name}", _details(name, content, out / names.log, brief)]
    page = "\n\n".join(parts) + "\n"
    if brief and len(page) > BRIEF_CHARACTERS:
        page = page[:BRIEF_CHARACTERS].rsplit("\n", 1)[0] + f"\n... the rest is in {out / names.page}"
    return page


def _read(path: Path, kind: str) -> Report | str:
    """What a stage left, or why it cannot be read."""
    try:
        return load(path, kind)
    except (OSError, ValueError) as error:
        return f"No result ({type(error).__name__}: {error})."


def _targets(found: dict[str, Report | str]) -> str:
    reports = [found[kind] for kind in (FAST, PROGRAMS) if isinstance(found.get(kind), Report)]
    lines = [line for report in reports for line in scoreboard.lines_of(report)]
    return scoreboard.markdown(lines) if lines else "No target was measured."


def _wrong(found: dict[str, Report | str]) -> Iterable[str]:
    """A wrong kernel comes before one that does not compile, and that before a program that fails."""
    for kind in (RIGHT, FAST, SANITIZER, COMPILE, PROGRAMS, TUNE):
        report = found.get(kind)
        if isinstance(report, Report) and kind in (FAST, PROGRAMS):
            failed = [r for r in report.rows if r.provider.startswith(OURS) and r.status in (FAILED, WRONG)]
            yield from (f"{kind} {' '.join(r.group)}: {r.provider}: {r.status}: {r.reason}" for r in failed)
        elif isinstance(report, Report):
            yield from stages.failures(report)


def _no_time(found: dict, outcomes: list) -> Iterable[str]:
    for outcome in outcomes:
        if outcome.status.startswith(("stopped", "not started")):
            yield f"{outcome.name}: {outcome.status}"
    for name, content in found.items():
        if left := getattr(content, "left_out", []):
            yield f"{name}: {len(left)}: " + "; ".join(left)


def _details(name: str, content: Report | str, log: Path, brief: bool) -> str:
    if isinstance(content, str):
        return f"{content}\n\n{_tail(log)}"
    if name == COMPILE:
        slowest = sorted(content.rows, key=lambda row: -row.get("seconds", 0))[:3]
        return f"{content.beside['launches']} launches in {content.beside['seconds']} s; the slowest: " + ", ".join(
            f"{row['what']} {row.get('seconds', 0):.1f} s" for row in slowest
        )
    if name == RIGHT:
        return _right(content.rows, brief)
    if name == FAST:
        return (
            "\n".join(_limited(tables.brief_lines(tables.ours(content)), _ROWS)) if brief else tables.markdown(content)
        )
    if name == PROGRAMS:
        return "\n\n".join("\n".join(tables.program_lines(comparison)) for comparison in content.groups())
    if name == SANITIZER:
        return "\n".join(f"- {stages.tool_line(row)}" for row in content.rows)
    return "\n".join(_limited([f"- {row['site']}: {row['status']}" for row in content.rows], _ROWS))


def _right(rows: list[dict], brief: bool) -> str:
    passed, failed = sum(bool(row["passed"]) for row in rows), sum(map(stages.wrong, rows))
    worst = stages.worst_first(rows)[: _WORST if brief else 4 * _WORST]
    head = f"{passed} passed, {failed} failed; the worst, by error over budget:"
    return "\n".join([head, *(f"- {stages.line(row)}" for row in worst)])


def _lines(lines: Iterable[str], most: int | None, nothing: str) -> str:
    return "\n".join(_limited([f"- {line[:400]}" for line in lines], most)) or nothing


def _limited(lines: list[str], most: int | None) -> list[str]:
    if most is None or len(lines) <= most:
        return lines
    return [*lines[:most], f"  ... and {len(lines) - most} more in the file"]


def _tail(log: Path, lines: int = 15) -> str:
    try:
        last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
    except OSError:
        return f"{log.name} was not written."
    return f"The end of {log.name}:\n\n" + "\n".join(f"    {line[:200]}" for line in last)
