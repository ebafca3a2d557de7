"""Runs that are killed at any moment and resumed end as the run that was not, bit for bit."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

KILLED = {"gpt": 4, "mlp": 2, "dpo": 2, "ppo": 2, "align": 2}  # runs of each command, each killed once or twice


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
def test_a_killed_run_ends_as_the_uninterrupted_one(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    counts = [str(word) for pair in KILLED.items() for word in pair]
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("soak.py"), tmp_path, "0", *counts],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    runs = [json.loads(line) for line in done.stdout.splitlines()]
    assert Counter(run["command"] for run in runs) == KILLED
    for run in runs:
        assert -9 in run["statuses"]
        assert run["statuses"][-1] == 0, run
        assert run["different"] == [], run["command"]
