"""Sections of `primer-fast report` on what `make gpu` found besides times: right or wrong, compiled, tuned."""

from html import escape

from primer_fast.bench.report import COMPILE, RIGHT, SANITIZER, TUNE, Report
from primer_fast.bench.results import Found, Results
from primer_fast.bench.stages import stages
from primer_fast.cli import page
from primer_fast.cli.page import NONE, Cell, figure, grid

MOST_FAILURES, MOST_WORST, MOST_TUNED = 50, 8, 40  # rows of each table


def failures(results: Results) -> list[str]:
    """What was wrong on a GPU in the newest runs, a line each."""
    kinds = RIGHT, SANITIZER, COMPILE, TUNE
    newest = [found for kind in kinds for found in results.newest(kind)]
    return [f"{found.machine}: {line}" for found in newest for line in stages.failures(found.content)]


def not_kept(results: Results) -> list[str]:
    """What was measured and is not committed, since the op measured gave wrong results."""
    every = [*results.ops, *results.programs, *results.newest(TUNE)]
    return [
        f"{found.path}: {name}: {why}"
        for found in every
        for name, why in found.content.header.get("not_kept", {}).items()
    ]


def right(results: Results) -> str:
    """Every kernel on the GPU itself against PyTorch: what failed comes first."""
    parts = []
    for found in results.newest(RIGHT):
        stage = found.content
        parts.append(_heading(found))
        wrong = [row for row in stage.rows if stages.wrong(row)]
        if wrong:
            parts.append(grid(("wrong", "why"), [_words(row) for row in wrong[:MOST_FAILURES]], left=2))
        if len(wrong) > MOST_FAILURES:
            parts.append(page.text(f"... and {len(wrong) - MOST_FAILURES:,} more."))
        parts.append(grid(("check", "passed", "wrong", "nothing to try"), _counts(stage.rows)))
        judged = stages.worst_first(row for row in stage.rows if row["passed"])
        worst = [(stages.name_of(row), f"{row['error']:.2g}", f"{row['budget']:.2g}", f"{stages.part_of(row):.2f}")
                 for row in judged[:MOST_WORST]]  # fmt: skip
        if worst:
            head = ("nearest to the budget, of those that passed", "error", "budget", "part of it")
            parts.append(grid(head, worst))
        parts += _left_out(stage)
    if not parts:
        return ""
    note = "The production cases at their real sizes, forward and every gradient, against PyTorch on the same GPU."
    return page.section("Right on a GPU", page.text(note), *parts)


def others(results: Results) -> str:
    """Seconds of compilation, what the sanitizer found, what tuning gained."""
    parts = []
    for found in results.newest(COMPILE):
        stage = found.content
        failed = len(stages.failures(stage))
        counts = f"{stage.beside['launches']:,} launches compiled in {figure(stage.beside['seconds'])} s"
        parts += [_heading(found), page.text(f"{counts}; cases with errors: {failed}.")]
        parts += _left_out(stage)
    for found in results.newest(SANITIZER):
        rows: list[tuple[Cell, ...]] = [
            (
                row["tool"],
                row["status"],
                (NONE if row["errors"] is None else f"{row['errors']:,}", "bad" if row["errors"] else ""),
            )
            for row in found.content.rows
        ]
        parts += [_heading(found), grid(("compute-sanitizer", "status", "errors"), rows, left=2)]
    for found in results.newest(TUNE):
        gained = sorted(found.content.rows, key=_gain, reverse=True)
        head = ("op", "choice and bucket", "before, us", "tuned, us", "gain", "became")
        parts += [_heading(found), grid(head, map(_tuned, gained[:MOST_TUNED]), left=2), *_left_out(found.content)]
    return page.section("Compiled, sanitized and tuned on a GPU", *parts) if parts else ""


def _heading(found: Found) -> str:
    header = found.content.header
    made = f"{header['date']}, commit {header.get('commit') or 'unknown'}, torch {header['torch']}"
    return f"<h3>{escape(header['device'])} ({escape(found.path)})</h3>" + page.text(made)


def _words(row: dict) -> tuple[Cell, ...]:
    name, _, why = stages.line(row).partition(": ")
    return (name, "bad"), (why, "wide")


def _counts(rows: list[dict]) -> list[tuple[Cell, ...]]:
    counts: list[tuple[Cell, ...]] = []
    for check in dict.fromkeys(row["check"] for row in rows):
        mine = [row for row in rows if row["check"] == check]
        wrong = sum(map(stages.wrong, mine))
        passed = sum(bool(row["passed"]) for row in mine)
        untried = len(mine) - wrong - passed
        counts.append((check, f"{passed:,}", (f"{wrong:,}", "bad" if wrong else ""), f"{untried:,}"))
    return counts


def _tuned(row: dict) -> tuple[Cell, ...]:
    times = (_microseconds(row.get(key)) for key in ("default_seconds", "seconds"))
    winner = row.get("winner") if row.get("winner") != row.get("default") else None
    became = ", ".join(f"{name} {value}" for name, value in winner.items()) if winner else row["status"]
    return row["op"], row["site"], *times, figure(_gain(row) or None), became


def _gain(row: dict) -> float:
    """How many times faster the settings found are than those before; 0 where nothing was timed."""
    return row["default_seconds"] / row["seconds"] if row.get("seconds") and row.get("default_seconds") else 0.0


def _microseconds(seconds: float | None) -> str:
    return figure(None if seconds is None else 1e6 * seconds)


def _left_out(stage: Report) -> list[str]:
    if not stage.left_out:
        return []
    return [page.text(f"Left out: {len(stage.left_out):,}, the first: {stage.left_out[0]}.")]
