"""Of `primer-fast demo`."""

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Options:
    """Verify the kernels, train the primer's models on small real data, and write a page with pictures."""

    out: Path = Path("runs/demo")  # folder of the page and of the runs


def parse(argv: list[str]) -> Options:
    return tyro.cli(Options, args=argv, prog="primer-fast demo")
