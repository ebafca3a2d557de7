"""Processes that work together, started as torchrun starts them; and whether a process has ended."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path


def run_processes(count, script, *arguments, **environment):
    """Run ``script`` in ``count`` processes; the test fails with what they said where one of them fails."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    common = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} | environment
    common |= {"WORLD_SIZE": str(count)}
    command = [sys.executable, str(script), *map(str, arguments)]
    started = [
        subprocess.Popen(
            command, env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(count)
    ]
    try:
        said = [process.communicate()[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * count, "\n".join(said)


def ends(pid):
    """Whether a process ends within a minute; one that nobody has collected yet has ended."""
    for _ in range(600):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False
