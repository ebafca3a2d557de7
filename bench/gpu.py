"""python -m primer_fast.bench.gpu --out DIR: tests, verification and benchmarks on this GPU, within a time limit.

Each stage is a process of its own with its own limit; one that fails or hangs does not stop the next. Everything is in
DIR when it ends, or up to where it was interrupted: logs, tests.xml, verify.json, bench.json, summary.md. ``--only
tune`` searches launch settings instead, into DIR/tuned.
"""

import argparse
import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch

from primer_fast.bench import environment, summary

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("tests", "verify", "bench")
ASKED_FOR = ("tune",)  # with --only

LOG_BYTES = 8 << 20  # a compiler that prints its whole input can fill a disk
_CLOSING_SECONDS = 15  # kept from the total for ending the last stage and writing the summary


@dataclass(frozen=True)
class Stage:
    """``share``: of the time that is left when it starts; ``command(seconds)``: its command line, given its limit.

    ``leaves`` is the file that it must have written: one that ends well without it has not run what it should.
    """

    name: str
    share: float
    command: Callable[[float], list[str]]
    leaves: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)  # beside this process's own


@dataclass(frozen=True)
class Outcome:
    """``status``: "passed", "failed (why)", "stopped after N s" or "not started: why"."""

    name: str
    status: str
    seconds: float

    @property
    def passed(self) -> bool:
        return self.status == "passed"


def stages(out: Path, pytest_args: list[str], interpreted: bool) -> list[Stage]:
    """The stages, in the order in which a failure matters; ``interpreted``: kernels run without a GPU."""
    environment = {"TRITON_INTERPRET": "1"} if interpreted else {}
    xml, verified, timed = out / "tests.xml", out / "verify.json", out / "bench.json"
    python = [sys.executable, "-u", "-m"]
    tests = [
        *python,
        "pytest",
        "tests",
        "-vv",
        "--tb=short",
        "-rfE",
        "--durations=10",
        f"--junitxml={xml}",
        *(["-n", str(max(2, (os.cpu_count() or 2) // 2))] if find_spec("xdist") else []),  # compiling takes the time
        *pytest_args,
    ]
    verify = [*python, "primer_fast.proof.verify", "--json", str(verified)]
    bench = [*python, "primer_fast.bench", "--json", str(timed), "--budget"]
    tune = [*python, "primer_fast.tuning", "--out", str(out / "tuned"), "--minutes"]
    return [
        Stage("tests", 0.45, lambda seconds: tests, xml, environment),
        Stage("verify", 0.4, lambda seconds: verify, verified, environment),
        Stage("bench", 1.0, lambda seconds: [*bench, f"{max(seconds - 20, seconds / 2):.0f}"], timed),
        Stage("tune", 1.0, lambda seconds: [*tune, f"{max(seconds - 20, seconds / 2) / 60:.2f}"]),
    ]


def run_all(todo: list[Stage], out: Path, seconds: float, header: dict) -> list[Outcome]:
    """Run the stages one after another within ``seconds`` in all; the summary is rewritten after each."""
    end = time.monotonic() + seconds - min(_CLOSING_SECONDS, seconds / 10)
    outcomes: list[Outcome] = []
    summary.save(out, header, outcomes)
    for stage in todo:
        limit = stage.share * (end - time.monotonic())
        if limit < 1:
            outcomes.append(Outcome(stage.name, "not started: no time was left", 0.0))
        else:
            print(f"{stage.name}: at most {limit:.0f} s ...", flush=True)
            outcomes.append(run_stage(stage, out / f"{stage.name}.log", limit))
        print(f"{stage.name}: {outcomes[-1].status}, {outcomes[-1].seconds:.0f} s", flush=True)
        summary.save(out, header, outcomes)
    return outcomes


def run_stage(stage: Stage, log: Path, limit: float, grace: float = 8.0) -> Outcome:
    """Run one stage with its output in ``log``; past ``limit`` seconds it is interrupted, then killed."""
    begin = time.monotonic()
    with log.open("w") as stream:
        try:
            process = subprocess.Popen(
                stage.command(limit),
                cwd=ROOT,
                env=os.environ | stage.environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_listen,
            )
        except OSError as error:
            return Outcome(stage.name, f"not started: {error}", 0.0)
        try:
            code = process.wait(limit)
            status = "passed" if code == 0 else f"failed (exit {code})"
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit:.0f} s"
        finally:
            _end(process, grace)
    _shorten(log)
    if status == "passed" and stage.leaves and not stage.leaves.exists():
        status = f"failed (exit 0, but no {stage.leaves.name})"
    return Outcome(stage.name, status, time.monotonic() - begin)


def _listen() -> None:
    """In the child: what runs in a shell's background inherits that SIGINT is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _end(process: subprocess.Popen, grace: float) -> None:
    """Interrupt the stage, so that it writes what it has; then kill it and whatever it started."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _shorten(log: Path) -> None:
    """Keep the beginning and the end of a log that is over LOG_BYTES."""
    if log.stat().st_size <= LOG_BYTES:
        return
    with log.open("rb") as stream:
        beginning = stream.read(LOG_BYTES // 2)
        stream.seek(-LOG_BYTES // 2, os.SEEK_END)
        ending = stream.read()
    log.write_bytes(beginning + b"\n... shortened ...\n" + ending)


def main(argv: list[str] | None = None) -> int:
    """The exit status is 0 if every stage passed, 1 if not, 2 without a GPU or for a wrong call."""
    parser = argparse.ArgumentParser(prog="python -m primer_fast.bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything together (9)")
    parser.add_argument("--only", nargs="+", choices=STAGES + ASKED_FOR, help="these stages alone, each with more time")
    parser.add_argument("--cpu", action="store_true", help="run without a GPU, kernels in Triton's interpreter: slow")
    parser.add_argument(
        "--pytest-args", type=shlex.split, default=[], metavar="ARGS", help="more arguments for the tests"
    )
    args = parser.parse_args(argv)
    if args.minutes <= 0:
        parser.error(f"--minutes must be positive; got {args.minutes:g}")
    if not torch.cuda.is_available() and not args.cpu:
        print("bench.gpu: this Python sees no CUDA GPU; --cpu runs the same stages without one", file=sys.stderr)
        return 2
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for name in summary.FILES:  # an older run's results must not pass for this one's
        (out / name).unlink(missing_ok=True)
    has_gpu = torch.cuda.is_available()
    header = environment.describe("cuda" if has_gpu else "cpu")
    todo = stages(out, args.pytest_args, not has_gpu)
    todo = [stage for stage in todo if stage.name in (args.only or STAGES)]
    if args.only:
        todo[-1] = dataclasses.replace(todo[-1], share=1.0)
    outcomes = run_all(todo, out, 60 * args.minutes, header)
    print("\n" + summary.text(out, header, outcomes, brief=True))
    return int(not all(outcome.passed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
