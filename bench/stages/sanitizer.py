"""python -m primer_fast.bench.stages.sanitizer: NVIDIA's compute-sanitizer over a small case of every kernel.

memcheck sees what reads or writes outside of its tensors, racecheck who writes shared memory that another has not yet
read. Each slows kernels down ten to a hundred times and is stopped at its share of the time; what it has said by then
is kept.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from shutil import which

import torch

from primer_fast.bench import environment, units
from primer_fast.bench.report import ERRORS, FAILED, NOT_AVAILABLE, PASSED, SANITIZER, STOPPED, Report
from primer_fast.bench.stages import stages

PROGRAM = "compute-sanitizer"
# PyTorch probes for driver functions that may be missing
TOOLS = {"memcheck": ("--report-api-errors", "no"), "racecheck": ()}
_BOTH = 30.0  # seconds that are worth dividing: starting PyTorch under a tool alone takes some ten
_GRACE = 3.0  # seconds for the tool to end when it is asked to
_LINES = 40

_SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) error")
_FINDING = re.compile(r"^=+ +(Invalid |Error: |Race reported|Misaligned |Out-of-range |Uninitialized |Program hit )")
_PLACE = re.compile(r"^=+ +(at |and |by thread |Address )")


@dataclass
class ToolRun:
    """One tool. ``errors``: None where it could not count; ``lines``: the first findings, and where it was last."""

    tool: str
    status: str
    errors: int | None = None
    lines: list[str] = field(default_factory=list)
    seconds: float = 0.0


def read_output(tool: str, text: str, code: int | None, seconds: float) -> ToolRun:
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
    return ToolRun(tool, status, errors, [*lines, *([at] if at else [])], round(seconds, 1))


def run_tool(tool: str, program: str, limit: float, small: bool) -> ToolRun:
    """Run the cases of bench/stages/sanitized.py under a tool, for at most ``limit`` seconds."""
    command = [program, "--tool", tool, *TOOLS[tool], sys.executable, "-u", "-m", "primer_fast.bench.stages.sanitized"]
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
    parser = argparse.ArgumentParser(
        prog="python -m primer_fast.bench.stages.sanitizer", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="rewritten after each tool")
    parser.add_argument("--budget", type=float, default=40.0, metavar="S", help="seconds for both tools (40)")
    parser.add_argument("--small", action="store_true", help="one case of each op")
    parser.add_argument("--resume", action="store_true", help="run the tools that the file lacks")
    args = parser.parse_args(argv)
    if args.budget <= 0:
        parser.error(f"--budget must be positive; got {args.budget:g}")
    header = environment.describe("cuda" if torch.cuda.is_available() else "cpu", args.small)
    before = units.resumed(args.json, SANITIZER, header) if args.resume else None
    report = before or Report(SANITIZER, header)
    program = which(PROGRAM)
    tried = {row["tool"] for row in report.rows}
    for tool in (tool for tool in TOOLS if tool not in tried):
        left = args.budget - (time.monotonic() - begin)
        if program is None:
            row = ToolRun(tool, NOT_AVAILABLE, lines=[f"{PROGRAM} is not on the PATH"])
        else:
            share = 0.5 if tool == "memcheck" and left >= _BOTH else 1.0
            row = run_tool(tool, program, max(share * left - _GRACE, 0.5), args.small)
        report.rows.append(asdict(row))
        report.save(args.json)
        print("\n".join([f"{stages.tool_line(report.rows[-1])}, {row.seconds:.0f} s", *row.lines]), flush=True)
    report.save(args.json)
    return int(any(row["status"] in (ERRORS, FAILED) for row in report.rows))


if __name__ == "__main__":
    units.leave(main())
