"""Kernels compiled for the tests of the proof, in processes of their own: those of the tests interpret them."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "bench" / "results" / "offline" / "sm_90.json"


def run_python(*arguments, **environment):
    """Run Python in the repository, not interpreting kernels unless told to."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=kept | environment, capture_output=True, text=True
    )


def names(rows):
    """One line a row, to say which are wrong and how."""
    lines = []
    for row in rows:
        where = (row[key] for key in ("target", "dtype", "op", "case", "direction", "kernel"))
        blocks = {key: value for key, value in row["constexprs"].items() if key.startswith("BLOCK")}
        lines.append(f"{' '.join(where)} {blocks}: {row['error'] or row['resources']}")
    return "\n" + "\n".join(lines)


def all_have(rows, condition):
    """There are rows, and each meets the condition; the test fails with those that do not."""
    without = [row for row in rows if not condition(row)]
    assert rows and not without, names(without)
