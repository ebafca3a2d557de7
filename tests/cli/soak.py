"""Runs that are killed and resumed until they are done, in children of this process, which has imported everything.

    python tests/cli/soak.py COMMAND KILLS SEED FOLDER      prints a line of JSON for each killed run

A child is killed at a moment that it counts itself (before, in the middle of and after what is written, synced and
renamed) or by the clock; either is drawn from the seed.
"""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from unittest import mock

import safetensors
import torch
import torch._dynamo  # which the first optimizer imports, a second of work

from primer_fast.cli import (  # those that are not named below are imported for the children
    align,
    main,
    run_folder,
    train_dpo,  # noqa: F401
    train_gpt,  # noqa: F401
    train_mlp,  # noqa: F401
    train_ppo,  # noqa: F401
)
from primer_fast.cli.run_folder import RunFolder
from primer_fast.data.preferences import RatedText

TIMES = ("seconds", "per_second")
SETTINGS = {  # command -> its arguments besides --out, in a folder that ``prepare`` filled
    "gpt": "train gpt --data words.txt --width 16 --layers 1 --heads 2 --context 16 --batch-size 4 --steps 24"
    " --warmup-steps 2 --log-every 1 --eval-every 4 --eval-batches 1 --sample-tokens 5 --dropout 0.1",
    "mlp": "train mlp --data soccer --epochs 60 --log-every 5",
    "dpo": "train dpo --data pairs.jsonl --model base --steps 20 --batch-size 8 --log-every 1 --lr 0.003",
    "ppo": "train ppo --prompts prompts.txt --model base --reward rewards:length --max-new-tokens 6 --steps 10"
    " --batch-size 8 --log-every 1 --lr 0.003",
    "align": "align --width 16 --layers 1 --heads 2 --pairs 60 --samples 40 --points 2 --point-samples 20 --betas 0.5 2"
    " --sft.steps 20 --sft.batch-size 16 --sft.log-every 2 --reward.steps 6 --reward.batch-size 16 --reward.log-every 1"
    " --ppo.steps 4 --ppo.batch-size 16 --dpo.steps 6 --dpo.batch-size 16 --dpo.lr 0.001",
}
BASE = (
    "train gpt --data letters.txt --out base --width 16 --layers 1 --heads 2 --context 12 --batch-size 4 --steps 2"
    " --sample-tokens 0"
)
PICTURES = ("curves", "attention", "positions", "embeddings", "confusion_matrix", "decision_surface", "mistakes")


class Axe:
    """Kills this process at the ``last`` of the moments at which a run writes."""

    def __init__(self, last: int | None):
        self.last, self.count = last, 0

    def moment(self) -> bool:
        """Count one; whether it is the last."""
        self.count += 1
        return self.count == self.last

    def fall(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def around(self, function):
        def hit(*args, **kwargs):
            if self.moment():
                self.fall()
            value = function(*args, **kwargs)
            if self.moment():
                self.fall()
            return value

        return hit

    def patch(self):
        write_bytes, log = run_folder.write_bytes, RunFolder.log

        def half_written(path, content):
            if self.moment():
                path.with_name(path.name + run_folder.TEMPORARY).write_bytes(content[: len(content) // 2])
                self.fall()
            write_bytes(path, content)

        def half_logged(folder, row):
            if self.moment():
                with folder.metrics.open("a") as file:
                    file.write(json.dumps(row)[:20])
                self.fall()
            log(folder, row)

        stack = (
            mock.patch.object(run_folder, "write_bytes", half_written),
            mock.patch.object(RunFolder, "log", self.around(half_logged)),
            mock.patch.object(os, "fsync", self.around(os.fsync)),
            mock.patch.object(os, "replace", self.around(os.replace)),
        )
        for part in stack:
            part.start()


def child(argv: list[str], *, last: int | None = None, delay: float | None = None, output: Path) -> tuple[int, int]:
    """Run the command in a child; -> its exit status, negative for a signal, and the moments that it counted."""
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            with output.open("a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            axe = Axe(last)
            axe.patch()
            status = main(argv)
            output.with_suffix(".count").write_text(str(axe.count))
        finally:
            sys.stdout.flush()
            os._exit(status)
    if delay is not None:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)  # a child that has ended is there until it is waited for
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    count = output.with_suffix(".count")
    return status, int(count.read_text()) if status == 0 and count.exists() else 0


def contents(folder: Path) -> dict:
    """All that a run has to show, without times."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                keys = sorted(file.keys())
                found[name] = (file.metadata(), [(k, file.get_tensor(k)) for k in keys])
        elif path.name == "metrics.jsonl":
            rows = map(json.loads, path.read_text().splitlines())
            found[name] = [{k: v for k, v in row.items() if not k.endswith(TIMES)} for row in rows]
        elif path.suffix == ".html":  # names its folder
            found[name] = path.read_text().replace(f"{folder.name}/", "OUT/")
        else:
            found[name] = path.read_bytes()
    return found


def differences(ours: dict, theirs: dict) -> list[str]:
    """The names of files that are not in both, or not the same bit for bit."""

    def same(a, b):
        if isinstance(a, torch.Tensor):
            return a.dtype == b.dtype and a.shape == b.shape and a.view(torch.uint8).equal(b.view(torch.uint8))
        if isinstance(a, list | tuple):
            return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
        return a == b

    def bits(value):
        if isinstance(value, tuple):
            return value[0], [(k, t.contiguous().flatten()) for k, t in value[1]]
        return value

    names = ours.keys() | theirs.keys()
    return sorted(n for n in names if n not in ours or n not in theirs or not same(bits(ours[n]), bits(theirs[n])))


def write_inputs() -> None:
    """What the commands are run on, in the current folder."""
    Path("words.txt").write_text("the cat sat on the mat, and the rat sat on the cat.\n" * 60)
    rows = [
        {"prompt": "", "chosen": a, "rejected": b} for a in ("good", "fine", "nice") for b in ("bad", "ugly", "sad")
    ]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("prompts.txt").write_text("go\na\n")
    Path("rewards.py").write_text("def length(prompts, completions):\n    return [len(c) for c in completions]\n")
    Path("letters.txt").write_text("abcdefghijklmnopqrstuvwxyz go\n" * 20)


@contextlib.contextmanager
def base_in(folder):
    """Inside it ``folder`` is the current one, with the inputs and the model of BASE. Nothing is printed or drawn."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.callback(os.chdir, os.getcwd())
        os.chdir(folder)
        stack.enter_context(mock.patch("primer_fast.backend.stand_in", None))
        for name in ("curves", "attention", "positions", "embeddings"):
            stack.enter_context(mock.patch(f"primer_fast.cli.gpt_plots.{name}", lambda *_: None))
        write_inputs()
        assert main(BASE.split()) == 0
        yield


def prepare() -> None:
    """The inputs, and the model that the procedures on completions begin with."""
    write_inputs()
    assert child(BASE.split(), output=Path("base.log"))[0] == 0, Path("base.log").read_text()


def without_pictures() -> None:
    """They take seconds, and are drawn from what is compared here."""
    from primer_fast.cli import cnn_plots, gpt_plots, plots, preference_plots

    for module in (plots, gpt_plots, cnn_plots, preference_plots):
        for name in PICTURES:
            if hasattr(module, name):
                setattr(module, name, lambda *_, **__: None)


def tiny_align() -> None:
    """A small lexicon, no pictures, and a clock that stands: its page then says the same whenever it is made."""
    parts = ("glad", "sad", "joy", "woe")
    words = [a + b + c for a in ("", "un") for b in parts for c in ("", "ful", "less", "ly", "ness")]
    rated = [RatedText(w, 2.0 if "glad" in w or "joy" in w else -2.0) for w in words]
    align.load_lexicon = lambda: rated
    align.align_plots.draw = lambda folder, result: [
        (folder / f"{name}.png").write_bytes(b"") for name in ("frontier", "samples", "curves")
    ]
    time.perf_counter = lambda: 0.0


def soak(command: str, kills: int, seed: int) -> None:
    prepare()
    if command == "align":
        tiny_align()
    argv = [*SETTINGS[command].split(), "--out"]
    begun = time.monotonic()
    words = argv[: next(i for i, word in enumerate(argv) if word.startswith("--"))]
    status, moments = child([*argv, "whole"], output=Path("whole.log"))
    seconds = time.monotonic() - begun
    assert status == 0, Path("whole.log").read_text()
    whole = contents(Path("whole"))
    draw = random.Random(seed)
    for number in range(kills):
        out, output = Path(f"run-{number}"), Path(f"run-{number}.log")
        statuses, killed = [], 0
        while True:
            resume = (out / "config.json").exists()
            how = {"last": draw.randint(1, moments)} if draw.random() < 0.7 else {"delay": draw.uniform(0, seconds)}
            if killed > number % 2:  # once or twice
                how = {}
            again = [*words, "--out", str(out), "--resume"] if resume else [*argv, str(out)]
            status, _ = child(again, output=output, **how)
            statuses.append(status)
            if status == -signal.SIGKILL:
                killed += 1
            elif status == 0 and killed == 0:  # it was done before its time came
                shutil.rmtree(out)
            else:
                break
        different = differences(contents(out), whole) if status == 0 else []
        print(json.dumps({"statuses": statuses, "different": different, "log": output.read_text()[-2000:]}), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    without_pictures()
    os.chdir(sys.argv[4])
    sys.path.insert(0, "")
    soak(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
