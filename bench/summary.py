"""summary.md of a GPU run: built from whatever files the stages have left so far."""

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

from primer_fast.bench import report, tables
from primer_fast.bench.files import replace_text

FILES = (
    *("tests.xml", "tests.log", "verify.json", "verify.log"),
    *("bench.json", "bench.log", "tune.log", "summary.md"),
)
BRIEF_CHARACTERS = 9_500
_FAILURES, _WORST, _ROWS = 25, 12, 40  # lines of each kind on the brief page


def save(out: Path, header: dict, outcomes: list) -> None:
    """Write DIR/summary.md; a reader never sees half of it."""
    replace_text(out / "summary.md", text(out, header, outcomes))


def text(out: Path, header: dict, outcomes: list, *, brief: bool = False) -> str:
    """The page: machine, stages, failing tests, worst verification, benchmarks; if brief, under 10,000 characters."""
    versions = ", ".join(
        f"{key} {header[key]}" for key in ("python", "torch", "triton", "cuda", "driver") if header[key]
    )
    parts = [f"# {header['device']}", f"{versions}, commit {header['commit'] or '-'}, {header['date']}"]
    parts.append("\n".join(f"- {o.name}: {o.status}, {o.seconds:.0f} s" for o in outcomes) or "- nothing has run yet")
    ran = {outcome.name for outcome in outcomes}
    sections = {"tests": _tests, "verify": _verification, "bench": _benchmarks, "tune": _tuning}
    for name, section in sections.items():
        if name in ran:
            parts += [f"## {name}", section(out, brief)]
    page = "\n\n".join(parts)
    if brief and len(page) > BRIEF_CHARACTERS:
        page = page[:BRIEF_CHARACTERS].rsplit("\n", 1)[0] + f"\n... the rest is in {out / 'summary.md'}"
    return page


def _tuning(out: Path, brief: bool) -> str:
    return _tail(out / "tune.log")


def _tests(out: Path, brief: bool) -> str:
    counted = test_counts(out)
    if counted is None:
        return "No result.\n\n" + _tail(out / "tests.log")
    counts, failures = counted
    lines = [", ".join(f"{number} {name}" for name, number in counts.items())]
    return "\n".join(lines + _limited([f"- {failure}" for failure in failures], _FAILURES if brief else None))


def test_counts(out: Path) -> tuple[dict[str, int], list[str]] | None:
    """Counts by result, and the failures with their first line; from tests.xml, or the log of a killed run, or None."""
    counts = {"passed": 0, "failed": 0, "errors": 0, "skipped": 0}
    failures = []
    try:
        root = ET.parse(out / "tests.xml").getroot()
    except (OSError, ET.ParseError):
        return _counts_from_log(out / "tests.log")
    for test in root.iter("testcase"):
        kinds = {"failure": "failed", "error": "errors", "skipped": "skipped"}
        found = next((child for child in test if child.tag in kinds), None)
        counts[kinds[found.tag] if found is not None else "passed"] += 1
        if found is not None and found.tag != "skipped":
            first = (found.get("message") or "").strip().splitlines()[:1]
            failures.append(f"{test.get('classname')}::{test.get('name')}: {''.join(first)[:200]}")
    return counts, failures


def _counts_from_log(log: Path) -> tuple[dict[str, int], list[str]] | None:
    """From pytest's "path::test RESULT [ n%]" lines."""
    if not log.exists():
        return None
    found = re.findall(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", log.read_text(errors="replace"), re.MULTILINE)
    if not found:
        return None
    kinds = {"passed": "PASSED", "failed": "FAILED", "errors": "ERROR", "skipped": "SKIPPED"}
    counts = {name: sum(result == kind for _, result in found) for name, kind in kinds.items()}
    return counts, [f"{name}: see tests.log" for name, result in found if result in ("FAILED", "ERROR")]


def _verification(out: Path, brief: bool) -> str:
    """verify.json: a list of rows as proof.verify writes them."""
    try:
        rows = json.loads((out / "verify.json").read_text())
        worst = sorted(rows, key=lambda row: (row["passed"], -_part_of_budget(row)))
        failed = sum(not row["passed"] for row in rows)
        lines = [f"{len(rows) - failed} passed, {failed} failed; the worst, by error over budget:"]
        shown = worst[:_WORST] if brief else worst[: max(4 * _WORST, failed)]
        lines += [
            f"- {'ok' if row['passed'] else 'FAILED'} {_name(row)}: error {_figure(row['error'])}, "
            f"budget {_figure(row['budget'])}"
            for row in shown
        ]
        return "\n".join(lines)
    except (OSError, ValueError, KeyError, TypeError) as error:
        lines = [f"No rows ({type(error).__name__}: {error})."]
        if (out / "verify.log").exists():  # one line per finished case
            log = (out / "verify.log").read_text(errors="replace").splitlines()
            failed = [f"- {line}" for line in log if line.startswith("FAILED ")]
            finished = sum(line.startswith("ok ") for line in log)
            lines.append(f"In the log: {finished} cases passed, {len(failed)} failed.")
            lines += _limited(failed, _WORST if brief else None)
        return "\n".join(lines) + "\n\n" + _tail(out / "verify.log")


def _name(row: dict) -> str:
    return " ".join(str(row[key]) for key in ("op", "case", "dtype", "path", "tensor") if key in row)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"


def _part_of_budget(row: dict) -> float:
    error, budget = row["error"], row["budget"]
    if error is None or error != error:  # no figure, or NaN: worse than any
        return float("inf")
    return error / budget if budget else float("inf") if error else 0.0


def _benchmarks(out: Path, brief: bool) -> str:
    try:
        found = report.load(out / "bench.json")
    except (OSError, ValueError) as error:
        return f"No rows ({error}).\n\n" + _tail(out / "bench.log")
    if not brief:
        return tables.markdown(found)
    ours = tables.ours(found)
    targets = [row for row in ours if row.targets]
    missed = [line for line in tables.target_lines(ours) if line.startswith("MISSED")]
    met = sum(len(row.targets) for row in targets) - len(missed)
    lines = [*tables.header_lines(found), *_limited(tables.brief_lines(ours), _ROWS)]
    others = [row for row in found.rows if row.status != "ok" and row not in ours]
    lines += _limited([f"  {' '.join(row.group)}, {row.provider}: {row.status}: {row.reason}" for row in others], 5)
    if targets:
        lines += [f"targets: {met} met, {len(missed)} missed", *_limited([f"  {line}" for line in missed], _FAILURES)]
    if found.left_out:
        lines.append(f"left out for want of time: {len(found.left_out)} groups, from {found.left_out[0]}")
    return "\n".join(lines)


def _limited(lines: list[str], most: int | None) -> list[str]:
    if most is None or len(lines) <= most:
        return lines
    return [*lines[:most], f"  ... and {len(lines) - most} more in summary.md"]


def _tail(log: Path, lines: int = 15) -> str:
    try:
        last = log.read_text(errors="replace").splitlines()[-lines:]
    except OSError:
        return f"{log.name} was not written."
    return f"The end of {log.name}:\n\n" + "\n".join(f"    {line[:200]}" for line in last)
