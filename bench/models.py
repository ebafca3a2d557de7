"""python -m primer_fast.bench.models NAME ...: whole training steps and texts of ours beside those of other programs.

A comparison runs the same model from the same weights on the same data: losses (or tokens) must agree before anything
is timed, then the programs take turns. Time, rate, peak memory, and how far the losses are apart. ``--all`` is what
`make gpu` runs, the most important first, or on a CPU what has a goal there. On a shared machine only ratios within one
comparison mean anything; the load before it began stands in the file.
"""

import argparse
import contextlib
import gc
import os
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from primer_fast import backend
from primer_fast.bench import environment, tables, units
from primer_fast.bench.op import OURS
from primer_fast.bench.peers import failure
from primer_fast.bench.programs.dpo_step import dpo_step, dpo_trl
from primer_fast.bench.programs.generation import generation
from primer_fast.bench.programs.launchers import launchers
from primer_fast.bench.programs.loss_head import loss_head
from primer_fast.bench.programs.ppo_step import ppo_step
from primer_fast.bench.programs.supervised_step import cnn, mlp
from primer_fast.bench.programs.to_accuracy import cnn_99, mlp_99
from primer_fast.bench.programs.transformer_step import COMPILED, characters, compile_nanogpt, gpt2, gpt2_compiled
from primer_fast.bench.programs.wrappers import wrappers
from primer_fast.bench.report import FAILED, NOT_AVAILABLE, OK, PROGRAMS, ProgramRow, Report
from primer_fast.bench.units import DeviceLost

# Device, seconds a provider is timed, whether torch.compile takes part, whether sizes are those of a rehearsal.
Part = Callable[[str, float, bool, bool], list[ProgramRow]]


PARTS: dict[str, Part] = {
    "mlp": mlp, "cnn": cnn, "nanogpt": characters, "gpt2": gpt2, "dpo": dpo_step, "ppo": ppo_step,
    "generation": generation, "loss_head": loss_head, "wrappers": wrappers, "launchers": launchers,
    "gpt2_compiled": gpt2_compiled, "mlp_99": mlp_99, "cnn_99": cnn_99, "dpo_trl": dpo_trl,
}  # fmt: skip
# What `make gpu` asks, the most important first; ``order`` moves gpt2_compiled to the end while it is not compiled yet.
ON_GPU = (
    "gpt2", "ppo", "cnn_99", "dpo", "gpt2_compiled", "mlp_99", "generation", "launchers", "wrappers", "nanogpt",
    "loss_head",
)  # fmt: skip
ON_CPU = ("nanogpt", "cnn", "dpo", "generation", "loss_head", "wrappers", "launchers")  # five minutes on two idle cores
# Estimated seconds on one H100 with all kernels compiled. None is measured. About 2 s of each are the model's set-up,
# and a provider is timed for 1 s; a GPT-2 step of 12 x 1024 tokens takes 26 ms (llm.c: 468k tokens/s).
ESTIMATES: dict[str, float] = {
    "gpt2": 9.0,  # three providers, each some 15 steps besides
    "gpt2_compiled": 50.0,  # nanoGPT's train.py calls its compilation "a ~minute"
    "cnn_99": 7.0,  # drawing 70,000 digits 3 s; 9 runs of 150 to 250 steps of at most 1 ms
    "mlp_99": 9.0,  # 9 runs of about 1,200 steps of 0.2 ms (a graph) to 1 ms
    "dpo": 8.0,  # 8,192 tokens a step: 20 ms, in plain PyTorch twice that
    "ppo": 16.0,  # 2 x 7 rollouts of 53 tokens at 3 ms, 16 updates of 20 ms after each
    "wrappers": 4.0,  # eight pairs of calls, a quarter of a second each
    "launchers": 4.0,  # nine calls forward and both ways, and three others beside each
    "loss_head": 4.0,
    "nanogpt": 6.0,
    "generation": 20.0,  # 3 x 256 tokens: 3 ms each with a cache, 3 without, 10 by transformers, whose import is 5 s
    "mlp": 30.0, "cnn": 30.0, "dpo_trl": 60.0,  # torch.compile; two trainers
}  # fmt: skip
COMPILED_BEFORE = 20.0  # gpt2_compiled after --warm: Inductor's cache is read, and the model is traced again
# What the rows of a part are called, where it is not the part's name
SUBJECTS = {"gpt2_compiled": "gpt2", "mlp_99": "mlp", "cnn_99": "cnn", "dpo_trl": "dpo", "launchers": "launch"}
NO_TIME = "no time was left"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m primer_fast.bench.models", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="of " + ", ".join(PARTS))
    parser.add_argument(
        "--all", action="store_true",
        help=f"the programs that `make gpu` runs: {', '.join(ON_GPU)}; on a CPU {', '.join(ON_CPU)}",
    )  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, metavar="S", help="about as long as a program is timed (5; GPU: 1)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here, after every comparison")
    parser.add_argument("--budget", type=float, metavar="S", help="begin nothing that would not end within S seconds")
    parser.add_argument("--resume", action="store_true", help="go on with what FILE holds, if this code wrote it")
    parser.add_argument("--small", action="store_true", help="tiny models, to see that everything runs")
    parser.add_argument("--warm", action="store_true", help="only compile what gpt2_compiled will run, and keep that")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.names if name not in PARTS]:
        parser.error(f"no comparison named {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if args.all:
        args.names = list(dict.fromkeys([*args.names, *(order() if args.device == "cuda" else ON_CPU)]))
    if not args.names and not args.warm:
        parser.error("name what to compare, or --all")
    if args.resume and not args.json:
        parser.error("--resume needs --json FILE")
    if args.seconds is None:
        args.seconds = 0.0 if args.small else 1.0 if args.device == "cuda" else 5.0
    return args


def order() -> list[str]:
    """ON_GPU; the one that would take most of the time comes last where torch.compile has all its work before it."""
    return sorted(ON_GPU, key=lambda name: name == "gpt2_compiled" and not _warmed().exists())


def estimate(name: str) -> float:
    """Seconds of a part on one H100."""
    return COMPILED_BEFORE if name == "gpt2_compiled" and _warmed().exists() else ESTIMATES[name]


def _no_figures(name: str, status: str, reason: str, provider: str = OURS) -> ProgramRow:
    """The row of a part that has none of its own."""
    return ProgramRow(SUBJECTS.get(name, name), "all", provider, status=status, reason=reason)


def measure(name: str, device: str, seconds: float, with_compile: bool, small: bool = False) -> list[ProgramRow]:
    """The rows of one part; where ours raised, one that says so.

    Raises:
        DeviceLost: the GPU takes no more work.
    """
    try:
        return PARTS[name](device, seconds, with_compile, small)
    except DeviceLost:
        raise
    except Exception as error:
        traceback.print_exc()
        return [_no_figures(name, *failure(error, device))]
    finally:
        gc.collect()
        torch._dynamo.reset()
        if device == "cuda":
            with contextlib.suppress(Exception):  # a lost GPU has been noticed already
                torch.cuda.empty_cache()


def begun(args: argparse.Namespace, command: str) -> Report:
    """The report to go on with: what ``args.json`` holds, where that is asked for and this code wrote it.

    "done" in its header are the parts tried, and the seconds that each took.
    """
    header = environment.describe(args.device, args.small)
    header |= {"command": command, "load_before": os.getloadavg()[0], "done": {}}
    found = units.resumed(args.json, PROGRAMS, header) if args.resume else None
    if found is None:
        return Report(PROGRAMS, header)
    found.header.setdefault("done", {})
    found.rows = [row for row in found.rows if row.reason != NO_TIME]
    return found


def warm(small: bool) -> None:
    """Compile nanoGPT's step as ``gpt2_compiled`` will, so that Inductor's cache on disk has it."""
    compile_nanogpt(small)
    if not small:
        _warmed().touch()


def _warmed() -> Path:
    """The file that says so, of this code and this torch."""
    return Path(tempfile.gettempdir()) / f"primer_fast-compiled-{torch.__version__}-{environment.source()}"


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status is 0; 1 if one of ours failed or was wrong; 2 for a wrong call; units.LOST: call --resume."""
    begin, argv = time.monotonic(), sys.argv[1:] if argv is None else list(argv)
    args = parse(argv)
    if backend.interpreting and not args.small:
        print("bench: TRITON_INTERPRET is set, and the time of an interpreter says nothing; unset it", file=sys.stderr)
        return 2
    if args.warm:
        warm(args.small)
        return 0
    report = begun(args, shlex.join(["python", "-m", "primer_fast.bench.models", *argv]))
    done = report.header["done"]
    print(f"{report.header['device']}, {report.header['details']}, torch {torch.__version__}", flush=True)
    if args.device == "cuda":
        print(f"about {sum(estimate(name) for name in args.names if name not in done):.0f} s on an H100", flush=True)

    began: dict[str, float] = {}

    def ended(name: str) -> None:
        done[name] = round(time.monotonic() - began.get(name, time.monotonic()), 1)

    def rows_of(name: str) -> list[ProgramRow]:
        began[name] = time.monotonic()
        found = measure(name, args.device, args.seconds, not args.no_compile, args.small)
        ended(name)
        return found

    def failed(name: str, reason: str) -> ProgramRow:
        ended(name)
        return _no_figures(name, FAILED, reason)

    def after(name: str, found: list[ProgramRow]) -> None:
        for comparison in Report(PROGRAMS, report.header, found).groups():
            print("\n".join(["", *tables.program_lines(comparison)]))
        print(f"  ({name} took {done[name]:.0f} s)", flush=True)

    def patience(name: str) -> float:
        return 15 + 2 * estimate(name) if args.device == "cuda" and not args.small else units.FOREVER

    gc.freeze()  # each timing begins with a garbage collection, which would look at all that was imported
    alive = units.fill(
        report, args.json, args.names, rows_of, failed, done=done, after=after, expected=estimate, patience=patience,
        budget=None if args.budget is None else args.budget - (time.monotonic() - begin),
    )  # fmt: skip
    if not alive:
        return units.LOST
    for name in report.left_out:
        provider = COMPILED if name == "gpt2_compiled" else OURS
        report.rows.append(_no_figures(name, NOT_AVAILABLE, NO_TIME, provider))
        print(f"\n{name}: {NO_TIME}")
    if args.json:
        report.save(args.json)
    for line in tables.target_lines(report.rows):
        print(line)
    ours = [row for row in report.rows if row.provider.startswith(OURS)]
    return int(any(row.status not in (OK, NOT_AVAILABLE) for row in ours))


if __name__ == "__main__":
    units.leave(main())
