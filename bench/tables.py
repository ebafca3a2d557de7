"""Reports as plain text or Markdown; standard library only, since GPU machines are often bare."""

import math
import statistics

from primer_fast.bench.files import markdown_table
from primer_fast.bench.op import COMPILED, EAGER, OURS
from primer_fast.bench.report import OK, OpRow, ProgramRow, Report

_COLUMNS = {  # heading -> text of a row's cell
    "provider": lambda row: row.provider,
    "ms": lambda row: number(row.median_ms, 4) + ("*" if row.exposed else ""),
    "spread": lambda row: _percent(row.spread),
    "host us": lambda row: number(row.host_us, 3),
    "rate": lambda row: f"{number(row.rate, 3)} {row.unit}".strip(),
    "of ceiling": lambda row: _percent(row.share),
    "peak MiB": lambda row: number(row.peak_mib, 4),
    "error": lambda row: "-" if row.error is None else f"{row.error:.0e}",
    "x eager": lambda row: number(row.versus.get(EAGER), 3),
    "x compile": lambda row: number(row.versus.get(COMPILED), 3),
}
LEGEND = (
    "ms: median per call; spread: distance of the quartiles; of ceiling: least time that the measured ceilings allow "
    "over the median; error: relative Frobenius against eager; x eager, x compile: their time over this one's, round "
    "by round; noise: two timings of the same function; *: the device waited for the host."
)


def number(value: float | None, digits: int) -> str:
    """``digits`` significant digits, never an exponent."""
    if value is None:
        return "-"
    decimals = digits - 1 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{min(max(decimals, 0), 7)}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def header_lines(report: Report) -> list[str]:
    """The machine, the versions and the ceilings: what a figure needs beside it."""
    header = report.header
    products = ", ".join(f"{name} {number(t, 4)}" for name, t in header["ceilings"]["tflops"].items())
    versions = ", ".join(f"{name} {header[name]}" for name in ("python", "torch", "triton", "cuda") if header.get(name))
    return [
        f"{header['device']} ({header['details']})" if header.get("details") else header["device"],
        f"{versions}, driver {header.get('driver') or '-'}, commit {header.get('commit') or '-'}, {header['date']}",
        f"measured: {header['measures']}",
        f"ceilings: copy {number(header['ceilings']['copy_gbps'], 4)} GB/s; products in TFLOP/s: {products}",
    ]


def group_text(rows: list[OpRow]) -> str:
    """The rows that were timed against each other, under one heading."""
    noise = next((row.noise for row in rows if row.noise is not None), None)
    op, case, precision, pass_name = rows[0].group
    lines = [f"{op} {case}, {precision}, {pass_name} (noise {_percent(noise)})"]
    lines += _aligned([row for row in rows if row.status == "ok"], _COLUMNS)
    lines += [f"  {row.provider}: {row.status}, not timed: {row.reason}" for row in rows if row.status != "ok"]
    return "\n".join(lines)


def brief_lines(rows: list[OpRow]) -> list[str]:
    """One line per row, whatever its group: for a page that has room for our own rows alone."""
    kept = ("ms", "spread", "host us", "rate", "of ceiling", "x eager", "x compile")
    row_name = {"row": lambda row: " ".join(row.group)}
    lines = _aligned([row for row in rows if row.status == "ok"], row_name | {name: _COLUMNS[name] for name in kept})
    return lines + [f"  {' '.join(row.group)}: {row.status}: {row.reason}" for row in rows if row.status != "ok"]


def _aligned(rows: list[OpRow], columns: dict) -> list[str]:
    """A heading and one line per row, without the columns in which no row has anything."""
    if not rows:
        return []
    table = [[heading, *map(cell, rows)] for heading, cell in columns.items()]
    table = [column for column in table if set(column[1:]) != {"-"}]
    widths = [max(map(len, column)) for column in table]
    lines = []
    for first, *others in zip(*table, strict=True):
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        lines.append("  ".join(["", first.ljust(widths[0]), *cells]))
    return lines


def target_lines(rows: list[OpRow] | list[ProgramRow]) -> list[str]:
    """One line per target, missed ones first."""
    found = [(target["met"], " ".join(row.group), target) for row in rows for target in row.targets]
    return [
        f"{'met' if met else 'MISSED'}: {name}: {target['what']}, is {target['value']:.3g}"
        for met, name, target in sorted(found, key=lambda entry: entry[0])
    ]


def closing_lines(report: Report) -> list[str]:
    """What can be said once all groups are measured: noise, targets, what was left out, the legend."""
    lines = []
    if noises := [row.noise for row in report.rows if row.noise is not None]:
        worst, usual = _percent(max(noises)), _percent(statistics.median(noises))
        lines.append(f"noise: the same function timed twice was at most {worst} apart, {usual} in the median group")
    if targets := target_lines(report.rows):
        lines += ["targets:", *(f"  {line}" for line in targets)]
    if report.left_out:
        lines += ["left out for want of time:", *(f"  {what}" for what in report.left_out)]
    return [*lines, LEGEND]


def markdown(report: Report) -> str:
    """One table of all rows, with the header above it."""
    rows = []
    for row in report.rows:
        cells = [cell(row) for cell in _COLUMNS.values()]
        if row.status != OK:
            cells = [row.provider, f"{row.status}: {row.reason}", *[""] * (len(_COLUMNS) - 2)]
        rows.append([*row.group, *cells, _percent(row.noise)])
    table = markdown_table(["op", "case", "precision", "pass", *_COLUMNS, "noise"], rows)
    lines = [*(f"- {line}" for line in header_lines(report)), "", table]
    for line in closing_lines(report):
        lines += [f"- {line.strip()}"] if line.startswith("  ") else ["", line, ""]
    return "\n".join(lines)


def ours(report: Report) -> list[OpRow]:
    """Our own rows, those without figures included."""
    return [row for row in report.rows if row.provider == OURS]


def program_lines(rows: list[ProgramRow]) -> list[str]:
    """The rows of one comparison of whole programs."""
    return [f"{rows[0].name}: {rows[0].setting}", *(f"  {row.provider:<28} {_program_figures(row)}" for row in rows)]


def _program_figures(row: ProgramRow) -> str:
    if row.status != OK:
        return f"{row.status}: {row.reason}"
    parts = [f"{row.median_ms:.4g} ms ({row.low_ms:.4g} to {row.high_ms:.4g})"]
    parts += [f"{row.rate:,.4g} {row.unit}/s"] if row.unit else []
    parts += [f"{row.versus:.3g} x our time"] if row.versus not in (None, 1.0) else []
    parts += [f"peak {row.peak_mib:,.1f} MiB"] if row.peak_mib is not None else []
    parts += [f"loss {row.loss:.6g}"] if row.loss is not None else []
    parts += [f"{row.loss_difference:.1e} apart"] if row.loss_difference is not None else []
    parts += [f"[{'met' if t['met'] else 'MISSED'}: {t['what']}, is {t['value']:.3g}]" for t in row.targets]
    return ", ".join(parts)
