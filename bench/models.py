"""python -m primer_fast.bench.models NAME ...: whole training steps and texts of ours beside those of other programs.

A comparison runs the same model from the same weights on the same data: losses (or tokens) must agree before anything
is timed, then the programs take turns. Time, rate, peak memory, and how far the losses are apart.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence

import torch

from primer_fast import backend
from primer_fast.bench import dpo, generation, trial
from primer_fast.bench.loss_head import loss_head
from primer_fast.bench.op import OURS
from primer_fast.bench.peers import NotAvailable
from primer_fast.bench.ppo_step import ppo_step
from primer_fast.bench.supervised_step import cnn, mlp
from primer_fast.bench.transformer_step import characters, gpt2
from primer_fast.bench.trial import NOT_AVAILABLE, OK, Trial, TrialReport
from primer_fast.bench.turns import failure
from primer_fast.bench.wrappers import wrappers

Part = Callable[[str, float, bool], list[Trial]]  # device, seconds a provider, whether torch.compile takes part


def dpo_step(device: str, seconds: float, with_compile: bool) -> list[Trial]:
    """A DPO step beside TRL's DPOTrainer."""
    if device != "cpu":
        raise NotAvailable("the comparison with TRL is driven on a CPU")
    return dpo.trials()


def texts(device: str, seconds: float, with_compile: bool) -> list[Trial]:
    """256 tokens, with the cache, without, and by transformers."""
    return generation.trials(["--device", device, "--rounds", "5", "--batch", "1", "4"])


PARTS: dict[str, Part] = {
    "mlp": mlp, "cnn": cnn, "nanogpt": characters, "gpt2": gpt2, "dpo": dpo_step, "ppo": ppo_step,
    "generation": texts, "loss_head": loss_head, "wrappers": wrappers,
}  # fmt: skip


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m primer_fast.bench.models", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", choices=list(PARTS), metavar="NAME", help="of " + ", ".join(PARTS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S", help="about as long as a program is timed")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--json", metavar="FILE", help="write the trials here, after every comparison")
    return parser.parse_args(argv)


def measure(name: str, device: str, seconds: float, with_compile: bool) -> list[Trial]:
    """The trials of one part; where ours raised, one that says so."""
    try:
        return PARTS[name](device, seconds, with_compile)
    except Exception as error:
        status, reason = failure(error)
        return [Trial(name, "all", OURS, status, reason)]


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status is 0, or 1 if one of ours failed or was wrong, or 2 for a wrong call."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse(argv)
    if backend.interpreting:
        print("bench: TRITON_INTERPRET is set, and the time of an interpreter says nothing; unset it", file=sys.stderr)
        return 2
    command = shlex.join(["python", "-m", "primer_fast.bench.models", *argv])
    report = TrialReport(trial.header(args.device, command))
    print(f"{report.header['device']}, {report.header['details']}, torch {torch.__version__}", flush=True)
    for name in args.names:
        found = measure(name, args.device, args.seconds, not args.no_compile)
        report.trials += found
        for comparison in TrialReport(report.header, found).comparisons():
            print("\n".join(["", *trial.lines(comparison)]), flush=True)
        if args.json:
            report.save(args.json)
    return int(any(t.provider == OURS and t.status not in (OK, NOT_AVAILABLE) for t in report.trials))


if __name__ == "__main__":
    sys.exit(main())
