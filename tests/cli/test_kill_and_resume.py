"""Runs that are killed at any moment and resumed end as the run that was not, bit for bit; 20 train, 6 align."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLED = {"gpt": 8, "mlp": 4, "dpo": 4, "ppo": 4, "align": 6}  # runs of each command, each killed once or twice


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
@pytest.mark.parametrize("command", KILLED)
def test_a_killed_run_ends_as_the_uninterrupted_one(command, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("soak.py"), command, str(KILLED[command]), "0", tmp_path],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    runs = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(runs) == KILLED[command]
    for run in runs:
        assert -9 in run["statuses"]
        assert run["statuses"][-1] == 0, run["log"]
        assert run["different"] == []
