"""Of `primer-fast kernels`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass
class Options:
    """Compile ops' kernels for any GPU with the settings that their launchers choose, and list what the code needs."""

    ops: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Ops to compile; all if none is named."""
    target: tuple[str, ...] = ("sm_90",)
    """GPU architectures: sm_80, sm_90, sm_100, gfx942."""
    dtype: tuple[str, ...] = ()
    """float32, float16, bfloat16; all if none is named."""
    case: tuple[str, ...] = ()
    """Cases by name, as in primer_fast/reference; those of production size if none is named."""
    json: Path | None = None
    """Also write the table to this file."""
    jobs: int = 2
    """Processes that compile."""


def parse(argv: list[str]) -> Options:
    return tyro.cli(Options, args=argv, prog="primer-fast kernels")
