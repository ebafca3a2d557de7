"""python -m primer_fast.bench.cpu --json FILE: every comparison that is made on a CPU, each in a process of its own.

Only ratios within one comparison mean anything on a shared machine; the load before it began stands in the header.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from primer_fast.bench import trial
from primer_fast.bench.op import OURS
from primer_fast.bench.trial import FAILED, OK, Trial, TrialReport

PARTS = ("nanogpt", "cnn", "dpo", "generation", "loss_head", "wrappers", "launchers")  # of bench/models.py
SECONDS = 6.0  # that a program is timed; about 5 minutes for everything on two idle cores
LIMIT = 420.0  # seconds after which a part is stopped


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m primer_fast.bench.cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write the trials here, after every part")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="P", help="of " + ", ".join(PARTS))
    parser.add_argument("--seconds", type=float, default=SECONDS, metavar="S", help="about as long as each is timed")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    return parser.parse_args(argv)


def environment() -> dict[str, str]:
    """Of a part: kernels are not interpreted."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def measure(
    part: str, seconds: float, with_compile: bool, run: Callable[..., subprocess.CompletedProcess] = subprocess.run
) -> list[Trial]:
    """The trials of one part; where its process failed, one that says so with the last line it printed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trials.json"
        command = [sys.executable, "-m", "primer_fast.bench.models", part, "--device", "cpu", "--json", str(path)]
        command += ["--seconds", str(seconds), *([] if with_compile else ["--no-compile"])]
        try:
            done = run(command, capture_output=True, text=True, timeout=LIMIT, env=environment(), cwd=folder)
            if path.exists():
                return trial.load(path).trials
            last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1][:300]
            reason = f"exit status {done.returncode}: {last}"
        except subprocess.TimeoutExpired:
            reason = f"stopped after {LIMIT:.0f} s"
        except ValueError as error:
            reason = str(error)
    return [Trial(part, "all", OURS, FAILED, reason)]


def target_lines(report: TrialReport) -> list[str]:
    """One line per target, missed ones first; parts without figures before all."""
    lines = [f"NOT MEASURED: {t.name}: {t.reason}" for t in report.trials if t.provider == OURS and t.status != OK]
    judged = [(t, target) for t in report.trials for target in t.targets]
    for t, target in sorted(judged, key=lambda pair: pair[1]["met"]):
        lines.append(
            f"{'met' if target['met'] else 'MISSED'}: {t.name} ({t.setting}): {target['what']}, "
            f"is {target['value']:.3g}"
        )
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status is 0, or 1 if one of ours failed, or 2 for a wrong call; a missed target is no failure."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse(argv)
    report = TrialReport(trial.header("cpu", shlex.join(["python", "-m", "primer_fast.bench.cpu", *argv])))
    head = report.header
    print(f"{head['device']}, {head['details']}, torch {head['torch']}, commit {head['commit']}", flush=True)
    for part in args.only:
        began = time.monotonic()
        found = measure(part, args.seconds, not args.no_compile)
        report.trials += found
        for comparison in TrialReport(head, found).comparisons():
            print("\n".join(["", *trial.lines(comparison)]))
        print(f"  ({part} took {time.monotonic() - began:.0f} s)", flush=True)
        if args.json:
            report.save(args.json)
    print("\n" + "\n".join(target_lines(report)))
    return int(any(t.provider == OURS and t.status != OK for t in report.trials))


if __name__ == "__main__":
    sys.exit(main())
