"""How arrays of rows and columns are cut up by kernels that compute each element on its own."""

from typing import NamedTuple

from .device import Chip, cdiv
from .tunable import Choice, bucket_of


class GridSettings(NamedTuple):
    """Rows and columns of a tile, and the warps that share it."""

    BLOCK_ROWS: int
    BLOCK_COLS: int
    num_warps: int = 4


class Grid(NamedTuple):
    """An array of results: what the settings of its kernel depend on."""

    rows: int
    cols: int
    itemsize: int  # of an element, in bytes
    reads: int = 1  # loads for one element of the result: of a window, of several tables
    vector: bool = True  # up to 16 bytes of neighbours move together


def idle(cols: int, width: int) -> float:
    """The share of columns that lie past the array where tiles are ``width`` wide."""
    return 1 - cols / (cdiv(cols, width) * width)


def grid_default(gpu: Chip, p: Grid) -> GridSettings:
    """16 bytes a thread, in the widest tile of whose columns at most a quarter lies past the array.

    Where each element moves on its own, a thread gets 4 of them: addresses of more would fill the registers.
    """
    elements = GridSettings(1, 1).num_warps * (64 if gpu.is_amd else 32) * (16 // p.itemsize if p.vector else 4)
    width = min((256, 128, 64, 32, 16, 8), key=lambda width: max(idle(p.cols, width), 0.25))  # of equals, the first
    return GridSettings(elements // width, width)


def grid_bucket(p: Grid) -> str:
    single = {} if p.vector else {"vector": 0}
    return bucket_of(p.rows, p.cols, item=p.itemsize, reads=p.reads, **single)


def grid_fits(gpu: Chip, p: Grid, s: GridSettings) -> bool:
    """Whether a thread has at most 64 bytes of the result and the tile no more idle columns than the default or 25%."""
    held = s.BLOCK_ROWS * s.BLOCK_COLS * p.itemsize / (s.num_warps * 32)
    least = grid_default(gpu, p)
    return p.itemsize <= held <= 64 and idle(p.cols, s.BLOCK_COLS) <= max(idle(p.cols, least.BLOCK_COLS), 0.25)


def grid_choice(name: str) -> Choice:
    """The choice of one such kernel, by its name in tuned files."""
    return Choice(name, GridSettings, grid_bucket, grid_fits, grid_default)
