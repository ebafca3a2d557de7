"""Of `primer-fast show attention`."""

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Options:
    """Work one layer of causal attention out for "What is your name", number by number, and draw it."""

    out: Path = Path("runs/attention.png")  # the picture


def parse(argv: list[str]) -> Options:
    return tyro.cli(Options, args=argv, prog="primer-fast show attention")
