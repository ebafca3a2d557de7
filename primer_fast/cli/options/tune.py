"""Of `primer-fast tune`."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from primer_fast import kernels


@dataclass
class Options:
    """Search block sizes, warps, stages and splits for this GPU; what is found is used from the next start on.

    Candidates are pruned by what the chip holds, by an estimate, and by compiling them; what is left is timed.
    """

    ops: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Ops to tune; all if none is named."""
    dtype: tuple[str, ...] = ()
    """bfloat16, float32, float16, tf32; the first two if none is named."""
    minutes: float = 9.0
    """For everything together; what was found by then is written."""
    out: Path = Path(kernels.__file__).parent / "tuned"
    """Folder of <gpu>.json; buckets that stand there are skipped."""
    again: bool = False
    """Also buckets that stand there already."""
    dry_run: bool = False
    """Prune and compile, but time and write nothing."""
    target: str | None = None
    """With --dry-run: a GPU that need not be here: sm_80, sm_90, sm_100, gfx942."""
    jobs: int = max(1, (os.cpu_count() or 2) - 1)
    """Processes that compile."""


def parse(argv: list[str]) -> Options:
    return tyro.cli(Options, args=argv, prog="primer-fast tune")
