"""Calls of `primer-fast` in two processes each, forked from this one, which has imported everything.

    python tests/cli/pair.py CALLS     in the current folder; prints the status, output and errors of both processes

CALLS is JSON: for each call its words, and what happens in the second process alone: after how many steps it is asked
to stop, and its trouble: "error", one in the third step, while the first process waits for ever, or "late", it comes to
its end after the first.
"""

import json
import os
import socket
import sys
import time
from pathlib import Path

import torch
import torch._dynamo
import torch.distributed.checkpoint
import torch.distributed.fsdp

from primer_fast.cli import interruption, main
from primer_fast.cli.train import gpt as train_gpt  # noqa: F401
from primer_fast.train import parallel, supervised


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def output_of(rank, number):
    return [Path(f"call-{number}-{rank}.{name}") for name in ("out", "err")]


def child(rank, number, port, words, stop, trouble):
    here = {"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= here
    for path, descriptor in zip(output_of(rank, number), (1, 2), strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    asked, train_step = iter(range(10**9)), supervised.train_step

    def fails(state, *arguments):
        if state.step == 2:
            if rank == "1":
                raise RuntimeError("out of something")
            time.sleep(1000)  # stands for a sum on a GPU that never comes
        return train_step(state, *arguments)

    if stop is not None:
        interruption.Interruption.requested = lambda self: next(asked) >= stop and rank == "1"
    if trouble == "error":
        supervised.train_step = fails
    if trouble == "late" and rank == "1":
        parallel.World.fail = lambda self, tell, fail=parallel.World.fail: time.sleep(2) or fail(self, tell)
    status = 70
    try:
        status = main(words)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def both(number, words, stop, trouble):
    """Run a call to its end. -> the statuses, what was printed, what went to stderr, each by rank"""
    port, children = free_port(), []
    for rank in "01":
        children.append(os.fork())
        if children[-1] == 0:
            child(rank, number, port, words, stop, trouble)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    said = [[path.read_text() for path in output_of(rank, number)] for rank in "01"]
    return [statuses, *zip(*said, strict=True)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps([both(number, *call) for number, call in enumerate(json.loads(sys.argv[1]))]))
