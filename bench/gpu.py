"""python -m primer_fast.bench.gpu: measure all that is asked of a GPU, within a few minutes and without questions.

The stages run one after another, the most important first: everything is compiled, every kernel is compared with
PyTorch, then timed, then whole programs, then a checker of memory. Each is a process of its own with its own limit and
its own file; one that fails or hangs does not stop the next. What is in DIR is whole at any moment: the stages' files,
log.txt, and summary.md, which begins with the targets. ``--only tune`` searches launch settings instead, into
DIR/tuned, with tune.md and tune.txt beside them. ``--rehearse`` does all of it on a CPU, small, with a stand-in for the
GPU, in DIR/rehearsal. ``--estimate`` says how long each stage will take.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from primer_fast.bench import environment
from primer_fast.bench.stages import summary
from primer_fast.bench.units import LOST

ROOT = Path(__file__).resolve().parent.parent
LOG_BYTES = 8 << 20  # a compiler that prints its whole input can fill a disk
MINUTES = {"gpu": 6.0, "tune": 4.0}
CORES = 16  # that an estimate assumes
SECONDS_PER_ROW = 0.1  # for each provider of a row
_CLOSING_SECONDS = 15  # kept from the total for ending the last stage and writing the summary
_MARGIN = 8.0  # seconds that a stage is to end before its limit
_RESTART = 15.0  # seconds: with less time left, a stage is not started again


@dataclass(frozen=True)
class Stage:
    """A module that is run with ``--json leaves --budget S``: see units.py for its exit status.

    ``share``: of the time that is left when it starts; ``leaves``: the file that it must have written.
    """

    name: str
    share: float
    module: str
    leaves: Path
    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)  # beside this process's own
    rehearsed: bool = False

    def command(self, seconds: float, resume: bool = False) -> list[str]:
        """Its command line, given its limit."""
        stand_in = ["primer_fast.bench.stages.rehearsal"] if self.rehearsed else []
        budget = f"{max(seconds - _MARGIN, 0.7 * seconds):.0f}"
        options = ["--json", str(self.leaves), "--budget", budget, *(["--small"] if self.rehearsed else [])]
        options += ["--resume"] if resume else []
        return [sys.executable, "-u", "-m", *stand_in, self.module, *self.arguments, *options]


@dataclass(frozen=True)
class StageResult:
    """``status``: "passed", "failed (why)", "stopped after N s" or "not started: why"."""

    name: str
    status: str
    seconds: float

    @property
    def passed(self) -> bool:
        return self.status == "passed"


def stages(out: Path, rehearsed: bool = False) -> list[Stage]:
    """All stages of a run, in the order in which a failure matters.

    If each uses all that it is given, they have 59, 103, 99, 59 and 25 seconds of six minutes. What a stage does not
    use is left to those behind it.
    """
    seconds = "0.01" if rehearsed else f"{SECONDS_PER_ROW:g}"
    return [
        _stage(out, "compile", 0.17, "bench.stages.compile", rehearsed),
        _stage(out, "right", 0.36, "bench.stages.right", rehearsed, interpreted=True),
        _stage(out, "fast", 0.54, "bench", rehearsed, "--seconds-per-row", seconds),
        _stage(out, "programs", 0.7, "bench.models", rehearsed, "--all"),
        _stage(out, "sanitizer", 1.0, "bench.stages.sanitizer", rehearsed),
    ]


def tune_stage(out: Path, rehearsed: bool = False, report: Path | None = None) -> Stage:
    """The search for settings and ways; ``report``: a fast.json that says what is furthest below its target."""
    order = ("--from", str(report)) if report is not None else ()
    return _stage(out, "tune", 1.0, "tuning", rehearsed, "--out", str(out / "tuned"), *order, interpreted=True)


def _stage(
    out: Path, name: str, share: float, module: str, rehearsed: bool, *arguments: str, interpreted: bool = False
) -> Stage:
    """``interpreted``: in a rehearsal its kernels run too, slowly; elsewhere PyTorch's operators take their place."""
    extra = {"TRITON_INTERPRET": "1"} if rehearsed and interpreted else {}
    return Stage(name, share, f"primer_fast.{module}", out / f"{name}.json", arguments, extra, rehearsed)


def run_all(
    todo: list[Stage], out: Path, seconds: float, header: dict, names: summary.Names = summary.MEASURED
) -> list[StageResult]:
    """Run the stages one after another within ``seconds`` in all; the summary is rewritten after each."""
    end = time.monotonic() + seconds - min(_CLOSING_SECONDS, seconds / 10)
    outcomes: list[StageResult] = []
    summary.save(out, header, outcomes, names)
    for stage in todo:
        limit = stage.share * (end - time.monotonic())
        if limit < 1:
            outcomes.append(StageResult(stage.name, "not started: no time was left", 0.0))
        else:
            print(f"{stage.name}: at most {limit:.0f} s ...", flush=True)
            outcomes.append(run_stage(stage, out / names.log, limit))
        print(f"{stage.name}: {outcomes[-1].status}, {outcomes[-1].seconds:.0f} s", flush=True)
        summary.save(out, header, outcomes, names)
    for left in (*out.glob("*.begun"), *out.glob(".*.json.*")):  # of a stage that was killed
        left.unlink(missing_ok=True)
    return outcomes


def run_stage(stage: Stage, log: Path, limit: float, grace: float = 8.0) -> StageResult:
    """Run one stage with its output in ``log``; past ``limit`` seconds it is interrupted, then killed.

    A process that cannot go on, or that crashed, is followed by another, for what it had not reached.
    """
    begin, end = time.monotonic(), time.monotonic() + limit
    lost = 0
    with log.open("a", encoding="utf-8") as stream:
        while True:
            stream.write(f"\n===== {stage.name} =====\n")
            stream.flush()
            left = end - time.monotonic()
            status, code = _run_process(stage.command(left, resume=lost > 0), stage.environment, stream, left, grace)
            ended_early = code is not None and (code == LOST or code < 0 or code >= 128)
            if not ended_early or end - time.monotonic() < _RESTART:
                break
            lost += 1
    _shorten(log)
    if status == "passed" and not stage.leaves.exists():
        status = f"failed (exit 0, but no {stage.leaves.name})"
    if lost:
        status = f"failed ({lost} processes ended early); the last one: {status}"
    return StageResult(stage.name, status, time.monotonic() - begin)


def _run_process(
    command: list[str], extra: dict[str, str], stream, limit: float, grace: float
) -> tuple[str, int | None]:
    """Run a command -> how it ended, and its exit status if it ended by itself."""
    try:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | extra, stdout=stream, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_accept_interrupt,
        )  # fmt: skip
    except OSError as error:
        return f"not started: {error}", None
    try:
        code = process.wait(limit)
        return "passed" if code == 0 else f"failed (exit {code})", code
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s", None
    finally:
        _end(process, grace)


def _accept_interrupt() -> None:
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
    with suppress(subprocess.TimeoutExpired):  # one that waits in the driver may outlive this
        process.wait(10)


def _shorten(log: Path) -> None:
    """Keep the beginning and the end of a log that is over LOG_BYTES."""
    if log.stat().st_size <= LOG_BYTES:
        return
    with log.open("rb") as stream:
        beginning = stream.read(LOG_BYTES // 2)
        stream.seek(-LOG_BYTES // 2, os.SEEK_END)
        ending = stream.read()
    log.write_bytes(beginning + b"\n... shortened ...\n" + ending)


def writable_home() -> dict[str, str]:
    """HOME for the stages where this user's cannot be written: Triton, torch and matplotlib keep caches below it."""
    home = Path.home()
    if home.is_dir() and os.access(home, os.W_OK):
        return {}
    instead = Path(tempfile.gettempdir()) / f"primer_fast_home_{os.getuid()}"
    instead.mkdir(exist_ok=True)
    return {"HOME": str(instead)}


def main(argv: list[str] | None = None) -> int:
    """The exit status is 0 if every stage passed, 1 if not, 2 without a GPU or for a wrong call."""
    parser = argparse.ArgumentParser(prog="python -m primer_fast.bench.gpu", description=__doc__)
    names = [stage.name for stage in stages(Path())]
    parser.add_argument("--out", type=Path, default=Path("gpu-out"), metavar="DIR", help="gpu-out if not given")
    parser.add_argument("--minutes", type=float, help="for everything together (6; of the search 4)")
    parser.add_argument(
        "--only", nargs="+", choices=[*names, "tune"], metavar="STAGE", help=f"of {', '.join(names)}, tune; each longer"
    )
    parser.add_argument(
        "--from", dest="report", type=Path, metavar="FILE", help="the fast.json whose worst rows the search begins with"
    )
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: the same, small, on a stand-in")
    parser.add_argument("--estimate", action="store_true", help="say how long each stage will take, and run none")
    args = parser.parse_args(argv)
    tunes = args.only == ["tune"]
    minutes = args.minutes if args.minutes is not None else MINUTES["tune" if tunes else "gpu"]
    if minutes <= 0:
        parser.error(f"--minutes must be positive; got {minutes:g}")
    if args.estimate:
        return _estimate(minutes if tunes else None)
    if not torch.cuda.is_available() and not args.rehearse:
        print("bench.gpu: this Python sees no CUDA GPU; --rehearse runs the same stages without one", file=sys.stderr)
        return 2
    out = args.out.resolve() / ("rehearsal" if args.rehearse else "")  # which may replace no measured file
    out.mkdir(parents=True, exist_ok=True)
    measured = out / "fast.json"
    report = args.report.resolve() if args.report else measured if measured.exists() else None
    todo = [*stages(out, args.rehearse), tune_stage(out, args.rehearse, report)]
    todo = [stage for stage in todo if stage.name in (args.only or names)]
    if args.only:
        todo[-1] = replace(todo[-1], share=1.0)
    pages = summary.TUNED if tunes else summary.MEASURED
    for name in (*(stage.leaves.name for stage in todo), *pages):  # an older run's results must not pass for this one's
        (out / name).unlink(missing_ok=True)
    for marker in out.glob("*.begun"):
        marker.unlink()
    os.environ.update(writable_home())
    header = environment.describe("cpu" if args.rehearse else "cuda")
    outcomes = run_all(todo, out, 60 * minutes, header, pages)
    print("\n" + summary.text(out, header, outcomes, pages, brief=True))
    return int(not all(outcome.passed for outcome in outcomes))


def _estimate(minutes: float | None) -> int:
    """Print how long the stages take, or with ``minutes`` how much of the search fits into them."""
    if minutes is not None:
        options = ["--estimate", "--minutes", f"{minutes:g}", "--jobs", str(CORES)]
        return subprocess.run([sys.executable, "-m", "primer_fast.tuning", *options]).returncode
    from primer_fast.bench.stages import estimate  # it reads every stage, which a run on a GPU has no time for

    print("\n".join(estimate.lines(CORES)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
