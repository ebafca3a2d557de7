"""Runs that are killed and resumed until they are done, in children of this process, which has imported everything.

    python tests/cli/soak.py FOLDER SEED COMMAND KILLS [COMMAND KILLS ...]   prints a line of JSON for each killed run

A child is killed at a moment that it counts itself (before, in the middle of and after what is written, synced and
renamed) or by the clock; either is drawn from the seed.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from unittest import mock

import torch
import torch._dynamo  # which the first optimizer imports, a second of work
from commands import ALIGN, CALLS, LEXICON, differences, make_base, without_pictures, write_inputs

from primer_fast.cli import align, main
from primer_fast.cli.run import folder as run_folder
from primer_fast.cli.run.folder import RunFolder


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


def child(function, *, last: int | None = None, delay: float | None = None, output: Path) -> tuple[int, int]:
    """Call ``function`` in a child; -> its exit status, negative for a signal, and the moments that it counted."""
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            with output.open("a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            axe = Axe(last)
            axe.patch()
            status = function() or 0
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


def tiny_align() -> None:
    """A small lexicon, no pictures, and a clock that stands: its page then says the same whenever it is made."""
    align.load_lexicon = lambda: LEXICON
    align.align_plots.draw = lambda folder, result: [
        (folder / f"{name}.png").write_bytes(b"") for name in ("frontier", "samples", "curves")
    ]
    time.perf_counter = lambda: 0.0


def soak(command: str, kills: int, seed: int) -> None:
    call = (ALIGN if command == "align" else CALLS[command].words).split()
    words = call[: next(i for i, word in enumerate(call) if word.startswith("--"))]
    whole, output = Path(f"whole-{command}"), Path(f"whole-{command}.log")
    begun = time.monotonic()
    status, moments = child(lambda: main([*call, "--out", str(whole)]), output=output)
    seconds = time.monotonic() - begun
    assert status == 0, output.read_text()
    draw = random.Random(seed)
    for number in range(kills):
        out, output = Path(f"run-{command}-{number}"), Path(f"run-{command}-{number}.log")
        statuses, killed = [], 0
        while True:
            resume = (out / "config.json").exists()
            how = {"last": draw.randint(1, moments)} if draw.random() < 0.7 else {"delay": draw.uniform(0, seconds)}
            if killed > number % 2:  # once or twice
                how = {}
            again = [*words, "--out", str(out), "--resume"] if resume else [*call, "--out", str(out)]
            status, _ = child(lambda again=again: main(again), output=output, **how)
            statuses.append(status)
            if status == -signal.SIGKILL:
                killed += 1
            elif status == 0 and killed == 0:  # it was done before its time came
                shutil.rmtree(out)
            else:
                break
        different = differences(out, whole) if status == 0 else []
        said = {"command": command, "statuses": statuses, "different": different, "log": output.read_text()[-2000:]}
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    without_pictures()
    folder, seed, *counts = sys.argv[1:]
    os.chdir(folder)
    sys.path.insert(0, "")
    write_inputs()
    assert child(make_base, output=Path("base.log"))[0] == 0, Path("base.log").read_text()
    for command, kills in sorted(zip(counts[::2], counts[1::2], strict=True), key=lambda pair: pair[0] == "align"):
        if command == "align":  # the last, since it stops the clock
            tiny_align()
        soak(command, int(kills), int(seed))
