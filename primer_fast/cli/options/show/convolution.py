"""Of `primer-fast show convolution`."""

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Options:
    """Work a convolution, its ReLU and its max-pool out, number by number, and draw them."""

    out: Path = Path("runs/convolution.png")  # the picture


def parse(argv: list[str]) -> Options:
    return tyro.cli(Options, args=argv, prog="primer-fast show convolution")
