"""How arrays of rows and columns are cut up where each element is made on its own."""

import functools
from typing import NamedTuple

from .device import Chip, cdiv
from .tunable import Choice, bucket_of


class TileSettings(NamedTuple):
    """A tile, and the warps that share it."""

    BLOCK_ROWS: int
    BLOCK_COLS: int
    num_warps: int = 4


class Grid(NamedTuple):
    """What the settings of such a kernel depend on."""

    rows: int
    cols: int
    itemsize: int  # of an element, in bytes
    reads: int = 1  # loads for one of the result: elements of a window, tables
    vector: bool = True  # neighbours move together, up to 16 bytes


def idle(cols: int, width: int) -> float:
    """Part of the columns of tiles of ``width`` that are not there."""
    return 1 - cols / (cdiv(cols, width) * width)


@functools.lru_cache(maxsize=4096)
def tile_settings(gpu: Chip, cols: int, itemsize: int, vector: bool = True) -> TileSettings:
    """16 bytes a thread, in the widest tile that leaves at most a quarter of its columns idle.

    4 elements where each moves on its own: the addresses of more fill the registers.
    """
    elements = TileSettings(1, 1).num_warps * (64 if gpu.is_amd else 32) * (16 // itemsize if vector else 4)
    width = min((256, 128, 64, 32, 16, 8), key=lambda width: max(idle(cols, width), 0.25))  # of equals, the first
    return TileSettings(elements // width, width)


def grid_bucket(p: Grid) -> str:
    single = {} if p.vector else {"vector": 0}
    return bucket_of(p.rows, p.cols, item=p.itemsize, reads=p.reads, **single)


def tile_fits(gpu: Chip, p: Grid, s: TileSettings) -> bool:
    """Whether a thread has at most 64 bytes of the result, and no more columns are idle than in the default."""
    held = s.BLOCK_ROWS * s.BLOCK_COLS * p.itemsize / (s.num_warps * 32)
    least = tile_settings(gpu, p.cols, p.itemsize)
    return p.itemsize <= held <= 64 and idle(p.cols, s.BLOCK_COLS) <= max(idle(p.cols, least.BLOCK_COLS), 0.25)


def tile_choice(name: str) -> Choice:
    """The choice of one such kernel."""
    default = lambda gpu, p: tile_settings(gpu, p.cols, p.itemsize, p.vector)  # noqa: E731
    return Choice(name, TileSettings, grid_bucket, tile_fits, default)
