"""The page of `primer-fast report`: what was measured, where, when and by which command, and what was not."""

from html import escape
from pathlib import Path

from primer_fast import __version__
from primer_fast.bench import history
from primer_fast.bench.op import COMPILED, EAGER, OURS
from primer_fast.bench.report import OK, OpRow, ProgramRow
from primer_fast.bench.results import Found, Results
from primer_fast.bench.stages.verdicts import (
    KINDS,
    MISSED,
    NOT_MEASURED,
    Verdict,
    newest_ops,
    newest_programs,
    readable,
)
from primer_fast.bench.tables import LEGEND
from primer_fast.cli import page
from primer_fast.cli.page import NONE, Cell, figure, grid, percent
from primer_fast.cli.report import gpu as report_gpu
from primer_fast.cli.report.plots import program, runs_of_ops

MOST_CHANGES, MOST_MISSED = 12, 8  # rows of the history's table, lines at the top


def page_of(results: Results, judged: list[Verdict], drawn: dict[str, Path], commit: str | None) -> str:
    """The whole page, with the pictures ``drawn`` inside it."""
    found = (results.reports, results.verified, results.compiled)
    files = sum(map(len, found))
    subtitle = (
        f"primer_fast {__version__}, commit {commit or 'unknown'}; made by primer-fast report from "
        f"{files} file{'' if files == 1 else 's'} under bench/results"
    )
    sections = [
        _in_short(results, judged), report_gpu.right(results), _targets(judged), _programs(results, drawn),
        _ops(results, drawn), _history(results, drawn), report_gpu.others(results), _verified(results),
        _compiled(results), _sources(results), _not_measured(results, judged),
    ]  # fmt: skip
    return page.page("primer_fast: what was measured", subtitle, *filter(None, sections), style=page.WIDE)


def _in_short(results: Results, judged: list[Verdict]) -> str:
    every = results.reports
    gpus = [found for found in every if found.content.header["kind"] == "cuda"]
    parts = []
    if wrong := report_gpu.failures(results):  # a wrong kernel comes before a slow one
        parts.append(page.number(f"{len(wrong):,} found wrong on a GPU", good=False))
        more = [f"... and {len(wrong) - MOST_MISSED:,} more, below"] if len(wrong) > MOST_MISSED else []
        parts.append(_bullets([f"Wrong: {line}" for line in wrong[:MOST_MISSED]] + more))
    if gpus:
        machines = ", ".join(dict.fromkeys(f"{f.content.header['device']}" for f in gpus))
        runs = len({(found.machine, found.content.header["date"][:10]) for found in gpus})
        parts.append(page.text(f"GPU: {runs} run{'s' if runs > 1 else ''} committed, on {machines}."))
    else:
        parts.append(page.text("No GPU run is committed: no figure on this page comes from a GPU."))
    rows = []
    for kind, name in KINDS.items():
        counts = [sum(v.kind == kind and v.result == result for v in judged) for result in ("met", MISSED)]
        unmeasured = sum(v.kind == kind and v.result == NOT_MEASURED for v in judged)
        rows.append((f"targets on a {name}", str(counts[0]), (str(counts[1]), "bad" if counts[1] else ""),
                     str(unmeasured)))  # fmt: skip
    parts.append(grid(("", "met", "missed", "not measured"), rows))
    missed = [v for v in judged if v.result == MISSED]
    lines = [f"Missed: {program(v.subject)}, {readable(v.what)}: {_measured(v)}" for v in missed[:MOST_MISSED]]
    if len(missed) > MOST_MISSED:
        lines.append(f"... and {len(missed) - MOST_MISSED} more, below")
    return page.section("In short", *parts, _bullets(lines))


def _bullets(lines: list[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" if lines else ""


def _measured(verdict: Verdict) -> str:
    if not verdict.figures:
        return verdict.reason
    worst, count = verdict.figures[0], len(verdict.figures)
    met = sum(f.met for f in verdict.figures)
    value = figure(worst.value)
    found = value if count == 1 else f"met in {met} of {count} cases, worst {value} ({worst.case})"
    return f"{found}. {verdict.reason}" if verdict.reason else found


def _targets(judged: list[Verdict]) -> str:
    classes = {MISSED: "bad", NOT_MEASURED: "none"}
    parts = [page.text("Met means: in every case of the newest committed run.")]
    for kind, name in KINDS.items():
        mine = sorted((v for v in judged if v.kind == kind), key=lambda v: v.result == NOT_MEASURED)
        rows = [
            (program(v.subject), (readable(v.what), "wide"), (v.result, classes.get(v.result, "met")),
             (_measured(v), "wide"))
            for v in mine
        ]  # fmt: skip
        table = grid(("what", "target", "result", "measured"), rows, left=4)
        if all(v.result == NOT_MEASURED for v in mine):
            table = f"<details><summary>{len(mine)} targets, none of them measured yet</summary>{table}</details>"
        parts.append(f"<h3>On a {name}</h3>{table}")
    return page.section("Targets", *parts)


def _programs(results: Results, drawn: dict[str, Path]) -> str:
    newest = newest_programs(results)
    if not newest:
        return page.section("Whole programs", page.text("No comparison of whole programs is committed."))
    parts = []
    for machine in dict.fromkeys(machine for machine, _, _ in newest):
        mine = {key[1:]: value for key, value in newest.items() if key[0] == machine}
        header = list(mine.values())[-1][0].content.header
        parts.append(f"<h3>{escape(header['device'])} ({escape(machine)})</h3>")
        parts.append(page.text(_machine(header)))
        if path := drawn.get(f"programs {machine}"):
            parts.append(page.picture(path, "Each program's time over ours, of the same step in turns"))
        rows: list[tuple[Cell, ...]] = []
        titles: dict[int, str] = {}
        for (name, setting), (_, comparison) in mine.items():
            titles[len(rows)] = f"{program(name)}: {setting}"
            rows += map(_trial_cells, comparison)
        head = ("by", "time", "quartiles", "a second", "its time over ours", "peak MiB", "loss apart")
        parts.append(grid(head, rows, titles=titles))
    legend = (
        "time: median of a run; peak: the most memory beyond what was there before; loss apart: the largest distance"
        " from ours over all steps. Programs ran in turns: drift falls on all alike; ratios are the turns' medians."
    )
    return page.section("Whole programs", *parts, page.text(legend))


def _trial_cells(trial: ProgramRow) -> tuple[Cell, ...]:
    by = (trial.provider, "ours" if trial.provider == OURS else "")
    if trial.status != OK:
        return by, (f"{trial.status}: {trial.reason}", "none wide")
    unit, scale = ("us", 1e3) if trial.median_ms < 0.1 else ("ms", 1)
    return (
        by, f"{figure(trial.median_ms * scale, 4)} {unit}",
        f"{figure(trial.low_ms * scale)} to {figure(trial.high_ms * scale)}",
        f"{figure(trial.rate, 4)} {trial.unit}", "" if trial.provider == OURS else figure(trial.versus),
        figure(trial.peak_mib), "" if trial.loss_difference is None else f"{trial.loss_difference:.0e}",
    )  # fmt: skip


def _machine(header: dict) -> str:
    versions = ", ".join(f"{key} {header[key]}" for key in ("python", "torch", "triton", "cuda") if header.get(key))
    load = f", load average before {header['load_before']:.1f}" if header.get("load_before") is not None else ""
    made = f"; made by: {header['command']}" if header.get("command") else ""
    details = f"{header['details']}; " if header.get("details") else ""
    return f"{header['date']}, commit {header.get('commit') or 'unknown'}; {details}{versions}{load}{made}"


def _ops(results: Results, drawn: dict[str, Path]) -> str:
    parts = []
    if not results.of_gpus():
        parts.append(page.text("Not measured on a GPU yet: python -m primer_fast.bench there writes what goes here."))
    for found in newest_ops(results):
        report = found.content
        parts.append(f"<h3>{escape(report.header['device'])} ({escape(found.path)})</h3>")
        parts.append(page.text(_machine(report.header) + f"; {report.header['measures']}"))
        parts += [page.picture(path, caption) for path, caption in _op_pictures(found, drawn)]
        for op in dict.fromkeys(row.op for row in report.rows):
            parts.append(_op_table(op, [row for row in report.rows if row.op == op]))
        if report.left_out:
            parts.append(
                page.text(f"Left out for want of time: {len(report.left_out)} groups, from {report.left_out[0]}.")
            )
    if newest_ops(results):
        parts.append(page.text(LEGEND))
    return page.section("Single ops", *parts)


def _op_pictures(found: Found, drawn: dict[str, Path]) -> list[tuple[Path, str]]:
    roof = "Under the measured ceilings; filled: forward, hollow: with a backward"
    beside = "Each provider's time over ours, case by case"
    return [
        (path, roof if key.startswith("roofline") else beside)
        for key, path in drawn.items()
        if key.startswith((f"roofline {found.path} ", f"speedups {found.path} "))
    ]


def _op_table(op: str, rows: list[OpRow]) -> str:
    groups: dict[tuple, list[OpRow]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    lines: list[tuple[Cell, ...]] = []
    titles: dict[int, str] = {}
    for (_, case, precision, pass_name), group in groups.items():
        noise = next((row.noise for row in group if row.noise is not None), None)
        titles[len(lines)] = f"{case}, {precision}, {pass_name} (noise {percent(noise)})"
        lines += map(_row_cells, group)
    head = ("by", "ms", "spread", "rate", "of ceiling", "peak MiB", "host us", "eager / it", "compile / it")
    timed = sum(row.status == "ok" and row.provider == OURS for row in rows)
    summary = f"<summary><b>{escape(op)}</b>: {timed} of {len(groups)} groups timed</summary>"
    return f"<details>{summary}{grid(head, lines, titles=titles)}</details>"


def _row_cells(row: OpRow) -> tuple[Cell, ...]:
    by = (row.provider, "ours" if row.provider == OURS else "")
    if row.status != "ok":
        return by, (f"{row.status}: {row.reason}", "none wide")
    return (
        by, figure(row.median_ms, 4), percent(row.spread), f"{figure(row.rate)} {row.unit}", percent(row.share),
        figure(row.peak_mib), figure(row.host_us), figure(row.versus.get(EAGER)), figure(row.versus.get(COMPILED)),
    )  # fmt: skip


def _history(results: Results, drawn: dict[str, Path]) -> str:
    parts = []
    for machine, reports in runs_of_ops(results).items():
        parts.append(f"<h3>{escape(machine)}: {len(reports)} runs</h3>")
        if path := drawn.get(f"history {machine}"):
            parts.append(page.picture(path, "Geometric mean over the cases that a run shares with the first"))
        rows = [
            (" ".join(change.group), figure(change.before_ms, 4), figure(change.after_ms, 4), figure(change.ratio),
             percent(change.noise))
            for change in history.changes(reports)
        ]  # fmt: skip
        kept = rows if len(rows) <= MOST_CHANGES else rows[: MOST_CHANGES // 2] + rows[-MOST_CHANGES // 2 :]
        dates = f"{reports[-2].header['date'][:10]} and {reports[-1].header['date'][:10]}"
        parts.append(page.text(f"Ours in the last two runs ({dates}), the largest changes both ways:"))
        parts.append(grid(("case", "before, ms", "after, ms", "after / before", "noise"), kept))
    series = history.ratios([found.content for found in results.programs])
    repeated = [(key, runs) for key, runs in series.items() if len(runs) > 1 and key[2] != OURS]
    if repeated:
        lines = [
            (f"{name}, {provider}", f"{runs[0][0][:10]} to {runs[-1][0][:10]}",
             " \u2192 ".join(figure(value) for _, value in runs[-6:]))
            for (name, _, provider), runs in repeated
        ]  # fmt: skip
        parts += ["<h3>Whole programs</h3>", grid(("program, by", "runs", "its time over ours"), lines, left=2)]
    if not parts:
        parts = [page.text("Nothing has been measured twice on one machine yet.")]
    return page.section("History", *parts)


def _verified(results: Results) -> str:
    if not results.verified:
        return ""
    rows = []
    for name, found in results.verified.items():
        failed = sum(not row["passed"] for row in found)
        rows.append((name, ", ".join(dict.fromkeys(row["dtype"] for row in found)), f"{len(found) - failed:,}",
                     (f"{failed:,}", "bad" if failed else "")))  # fmt: skip
    head = ("file", "dtypes", "within budget", "over budget")
    note = "Each kernel's output and gradients against NumPy in float64, as primer-fast verify does."
    return page.section("Verified", page.text(note), grid(head, rows, left=2))


def _compiled(results: Results) -> str:
    if not results.compiled:
        note = "No table of compiled kernels is committed; primer-fast kernels --json makes one, or report --compile."
        return page.section("Compiled code", page.text(note))
    parts = [
        page.text("What the launchers launch, compiled without a GPU. It shows what code needs, not how fast it is.")
    ]
    for name, table in results.compiled.items():
        made = [f"Triton {table['triton']}, torch {table['torch']}", table.get("date"), table.get("command")]
        commit = f"commit {table['commit']}" if table.get("commit") else None
        parts.append(f"<h3>{escape(name)}</h3>" + page.text(", ".join(filter(None, [*made, commit]))))
        parts.append(_compiled_table(table["rows"]))
    return page.section("Compiled code", *parts)


def _compiled_table(rows: list[dict]) -> str:
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["kernel"] or "(none)", row["dtype"], row["target"]), []).append(row)
    lines, before = [], None
    for (op, kernel, dtype, target), group in sorted(groups.items()):
        needs = [row["resources"] for row in group if row["resources"]]
        spilling = sum(r["spill_bytes"] > 0 or r["spill_instructions"] > 0 for r in needs)
        failed = len(group) - len(needs)
        matrix = " ".join(dict.fromkeys(name for r in needs for name in r["matrix"])) or NONE
        lines.append((
            op if op != before else "", kernel.removesuffix("_kernel"), f"{dtype}, {target}", matrix,
            str(len(group)), (str(failed), "bad" if failed else ""), _range(needs, "registers"),
            (str(spilling), "bad" if spilling else ""), _range(needs, "spill_bytes"),
            _range(needs, "shared_bytes", 1024), _range(needs, "programs_per_processor"), _range(needs, "instructions"),
        ))  # fmt: skip
        before = op
    head = ("op", "kernel", "for", "matrix", "launches", "failed", "registers", "spilling", "spill, bytes",
            "shared, KiB", "fit", "instructions")  # fmt: skip
    return grid(head, lines, left=4)


def _range(needs: list[dict], key: str, unit: int = 1) -> str:
    values = [round(r[key] / unit) for r in needs]
    if not values:
        return NONE
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,}\u2013{high:,}"


def _sources(results: Results) -> str:
    rows = [
        (found.path, found.content.header["device"], found.content.header["date"],
         found.content.header.get("commit") or NONE, _machine_versions(found.content.header),
         (found.content.header.get("command") or "python -m primer_fast.bench", "wide"))
        for found in results.reports
    ]  # fmt: skip
    parts = [grid(("file", "machine", "date (UTC)", "commit", "versions", "command"), rows, left=6)] if rows else []
    parts += [page.text(f"Not readable: {name}: {reason}") for name, reason in results.unreadable.items()]
    if not parts:
        parts = [page.text("Nothing is committed under bench/results yet.")]
    return page.section("Where the figures come from", *parts)


def _machine_versions(header: dict) -> str:
    return ", ".join(f"{key} {header[key]}" for key in ("torch", "triton", "cuda") if header.get(key))


def _not_measured(results: Results, judged: list[Verdict]) -> str:
    lines = []
    if not results.of_gpus():
        lines.append("Speed and memory of every kernel on a GPU: no GPU run is committed.")
    if not any(found.content.header["kind"] == "cuda" for found in results.programs):
        lines.append("Training steps and generation on a GPU: no GPU run of whole programs is committed.")
    for found in newest_ops(results):
        lines += [f"{found.path}: {what}, for want of time." for what in found.content.left_out]
        lines += [f"{found.path}: {' '.join(row.group)}, {row.provider}: {row.status}: {row.reason}"
                  for row in found.content.rows if row.provider == OURS and row.status != "ok"]  # fmt: skip
    for (machine, name, _), (_, comparison) in newest_programs(results).items():
        lines += [f"{machine}: {name}, {trial.provider}: {trial.status}: {trial.reason}"
                  for trial in comparison if trial.status != OK]  # fmt: skip
    lines += report_gpu.not_kept(results)
    unmeasured = sum(v.result == NOT_MEASURED for v in judged)
    if unmeasured:
        lines.append(f"{unmeasured} targets, each with its reason under Targets.")
    return page.section("Not measured", _bullets(lines) or page.text("Nothing is missing."))
