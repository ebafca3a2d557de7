"""Of `primer-fast report`."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from primer_fast import bench


@dataclass
class Options:
    """Write one self-contained HTML page of the benchmarks under bench/results: tables, pictures, targets, gaps."""

    out: Path = Path("report.html")
    """The page."""
    pictures: Path | None = None
    """Also keep the pictures as PNG files in this folder."""
    results: Path = Path(bench.__file__).parent / "results"
    """Folder of <machine>/*.json."""
    compile: bool = False
    """Compile the kernels now, for sm_90 in bfloat16, instead of reading a committed table; takes minutes."""
    jobs: int = 2
    """Processes that compile."""


def parse(argv: list[str]) -> Options:
    return tyro.cli(Options, args=argv, prog="primer-fast report")
