"""python -m primer_fast.bench.sanitizer: NVIDIA's compute-sanitizer over a small case of every kernel.

memcheck sees what reads or writes outside of its tensors, racecheck who writes shared memory that another has not yet
read. Each slows kernels down ten to a hundred times and is stopped at its share of the time; what it has said by then
is kept.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from shutil import which

import torch

from primer_fast.bench import environment
from primer_fast.bench.files import replace_text

SCHEMA = "sanitizer 1"
PROGRAM = "compute-sanitizer"
PASSED, ERRORS, STOPPED, FAILED, NOT_AVAILABLE = "passed", "errors", "stopped", "failed", "not available"
STATUSES = (PASSED, ERRORS, STOPPED, FAILED, NOT_AVAILABLE)
HEADER_KEYS = ("device", "kind", "date", "torch", "triton", "python", "source")
# PyTorch probes for driver functions that may be missing
TOOLS = {"memcheck": ("--report-api-errors", "no"), "racecheck": ()}
_SHARES = {"memcheck": 0.5, "racecheck": 1.0}  # of the time that is left when it begins
_GRACE = 3.0  # seconds for the tool to end when it is asked to
_LINES = 40

_SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) error")
_FINDING = re.compile(r"^=+ +(Invalid |Error: |Race reported|Misaligned |Out-of-range |Uninitialized |Program hit )")
_PLACE = re.compile(r"^=+ +(at |and |by thread |Address )")


@dataclass
class Row:
    """One tool. ``errors``: None where it could not count; ``lines``: the first findings, and where it was last."""

    tool: str
    status: str
    errors: int | None = None
    lines: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class Report:
    """What the tools found on one machine."""

    header: dict
    rows: list[Row] = field(default_factory=list)

    def save(self, path: str | Path) -> None:
        """Write JSON; a reader never sees half a file."""
        content = {"schema": SCHEMA, "header": self.header, "rows": [asdict(row) for row in self.rows]}
        replace_text(path, json.dumps(content, indent=1, allow_nan=False))


def load(path: str | Path) -> Report:
    """Read a report and check it.

    Raises:
        ValueError: not JSON, another schema, a missing header entry, an unknown or missing column or status, a number
            of errors that does not fit the status.
    """
    try:
        data = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"sanitizer {path}: must be JSON; {error}") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"sanitizer {path}: schema must be {SCHEMA!r}; got {found!r}")
    if not (isinstance(data.get("header"), dict) and isinstance(data.get("rows"), list)):
        raise ValueError(f"sanitizer {path}: must have a header and rows; got {', '.join(data)}")
    if missing := [key for key in HEADER_KEYS if key not in data["header"]]:
        raise ValueError(f"sanitizer {path}: header must have {', '.join(HEADER_KEYS)}; missing {', '.join(missing)}")
    return Report(data["header"], [_checked(path, number, row) for number, row in enumerate(data["rows"])])


def _checked(path: str | Path, number: int, data: dict) -> Row:
    def refuse(what: str) -> ValueError:
        return ValueError(f"sanitizer {path}: row {number} {what}")

    if not isinstance(data, dict) or set(data) != {f.name for f in fields(Row)}:
        raise refuse(f"must have {', '.join(f.name for f in fields(Row))}; got {data!r}")
    row = Row(**data)
    if row.status not in STATUSES:
        raise refuse(f"must have a status of {', '.join(STATUSES)}; got {row.status!r}")
    if (row.status == PASSED and row.errors != 0) or (row.status == ERRORS and not row.errors):
        raise refuse(f"is {row.status!r}, which does not go with errors {row.errors!r}")
    if row.status not in (PASSED, STOPPED) and not row.lines:
        raise refuse(f"is {row.status!r}, so it must say why")
    return row


def read_output(tool: str, text: str, code: int | None, seconds: float) -> Row:
    """What a tool said, as a row; code: its exit status, None where it was stopped."""
    said = text.splitlines()
    findings = [number for number, line in enumerate(said) if _FINDING.match(line)]
    kept: list[str] = []
    for number in findings:
        places = [line for line in said[number + 1 : number + 4] if _PLACE.match(line)]
        kept += [said[number], *places]
    at = next((line for line in reversed(said) if line.startswith("at ")), "")
    summary = next((match for line in reversed(said) if (match := _SUMMARY.search(line))), None)
    errors = int(summary[1] or summary[2]) if summary else len(findings)
    if errors:
        status = ERRORS
    elif code is None:
        status = STOPPED
    elif summary is None or code != 0 or at != "at the end":
        status = FAILED
        kept += [f"exit status {code}", *said[-10:]]
    else:
        status = PASSED
    lines = [re.sub(r"^=+ +", "", line)[:300] for line in kept[:_LINES]]
    return Row(tool, status, errors, [*lines, *([at] if at else [])], round(seconds, 1))


def run_tool(tool: str, program: str, limit: float, small: bool) -> Row:
    """Run the cases of bench/sanitized.py under a tool, for at most ``limit`` seconds."""
    command = [program, "--tool", tool, *TOOLS[tool], sys.executable, "-u", "-m", "primer_fast.bench.sanitized"]
    command += ["--small"] if small else []
    # Without PyTorch's cache each tensor has its own allocation, so that reading past its end is seen
    environ = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    begin, code = time.monotonic(), None
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environ, start_new_session=True
        )  # fmt: skip
        try:
            code = process.wait(max(limit, 0.1))
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it had started too
            process.wait()
        output.seek(0)
        return read_output(tool, output.read(), code, time.monotonic() - begin)


def main(argv: list[str] | None = None) -> int:
    """The exit status is 0; 1 if a tool found an error or did not work, 2 for a wrong call."""
    begin = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m primer_fast.bench.sanitizer", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="rewritten after each tool")
    parser.add_argument("--budget", type=float, default=40.0, metavar="S", help="seconds for both tools (40)")
    parser.add_argument("--small", action="store_true", help="one case of each op")
    parser.add_argument("--resume", action="store_true", help="run the tools that the file lacks")
    args = parser.parse_args(argv)
    if args.budget <= 0:
        parser.error(f"--budget must be positive; got {args.budget:g}")
    if args.resume and args.json.exists():
        report = load(args.json)
    else:
        report = Report(environment.describe("cuda" if torch.cuda.is_available() else "cpu"))
    program = which(PROGRAM)
    for tool in _missing(report.rows):
        left = args.budget - (time.monotonic() - begin)
        if program is None:
            row = Row(tool, NOT_AVAILABLE, lines=[f"{PROGRAM} is not on the PATH"])
        else:
            row = run_tool(tool, program, _SHARES[tool] * left - _GRACE, args.small)
        report.rows.append(row)
        report.save(args.json)
        print(
            "\n".join([f"{tool}: {row.status}, {row.errors or 0} errors, {row.seconds:.0f} s", *row.lines]), flush=True
        )
    report.save(args.json)
    return int(any(row.status in (ERRORS, FAILED) for row in report.rows))


def _missing(rows: Iterable[Row]) -> list[str]:
    there = {row.tool for row in rows}
    return [tool for tool in TOOLS if tool not in there]


if __name__ == "__main__":
    sys.exit(main())
