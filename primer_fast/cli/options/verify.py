"""Of `primer-fast verify`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass
class Options:
    """Compare every kernel, forward and each gradient, with NumPy in float64; without a GPU, in Triton's interpreter.

    The budget of a result is twice PyTorch's own error at that dtype, plus rounding.
    """

    ops: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Ops to verify; all if none is named."""
    dtype: tuple[str, ...] = ()
    """float32, float16, bfloat16; all if none is named."""
    case: tuple[str, ...] = ()
    """Cases by name, as in primer_fast/reference; all if none is named."""
    tensors: bool = False
    """Show every tensor, not only the worst of a case."""
    json: Path | None = None
    """Also write every comparison to this file."""


def parse(argv: list[str]) -> Options:
    return tyro.cli(Options, args=argv, prog="primer-fast verify")
