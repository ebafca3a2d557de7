"""How layer_norm's rows are cut up: what the settings depend on, and what they are where no file has better."""

import functools
from typing import NamedTuple

import triton

from .launch import Chip, cdiv
from .tunable import Bucket, Choice


class RowSettings(NamedTuple):
    """How rows are cut up. A row longer than BLOCK_N is read in blocks."""

    BLOCK_ROWS: int
    BLOCK_N: int
    num_warps: int
    STAGES: int = 1  # tiles of rows that a walking program has on their way, itself included
    programs: int = 0  # that walk over the rows
    CHUNK: int = 0  # rows longer than BLOCK_N between the two reads of their elements
    BLOCK_COLS: int = 0  # of such rows: BLOCK_ROWS x BLOCK_COLS is the tile for the sums over them


class Rows(NamedTuple):
    """What the settings depend on."""

    rows: int
    N: int
    itemsize: int  # of an element, in bytes
    arrays: int = 2  # of rows that are read and written


_HELD = 32768  # elements of a row that a program holds
_ACCUMULATED = 8192  # of a row whose sums for dw and db a program holds too: 16 a thread
_COLUMNS = 512  # of longer rows, whose sums a program holds


@functools.lru_cache(maxsize=4096)
def forward_settings(gpu: Chip, N: int) -> RowSettings:
    """A tile of whole rows; longer rows in blocks, by few programs: their rows stay in L2 for the second read."""
    lanes = 64 if gpu.is_amd else 32
    block = triton.next_power_of_2(max(N, 16))
    if block > _HELD:
        block = _HELD // 2
    rows = max(1, 4096 // block)
    held = 64 if block == _HELD else 32  # elements a thread
    return RowSettings(rows, block, max(4, rows * block // (held * lanes)))


@functools.lru_cache(maxsize=4096)
def backward_settings(gpu: Chip, N: int, itemsize: int) -> RowSettings:
    """A tile of rows that fits the registers beside the sums of dw and db; longer rows in blocks of columns."""
    lanes = 64 if gpu.is_amd else 32
    block = triton.next_power_of_2(max(N, 16))
    if block > _ACCUMULATED:
        threads = 16 * lanes
        chunk = 64 if N * itemsize <= 65536 else 32
        return RowSettings(threads * 16 // _COLUMNS, threads * 64 // itemsize, 16, 4 - itemsize // 2, 1, chunk, _COLUMNS)
    rows = max(1, 2048 // block)
    warps = max(4, rows * block // (16 * lanes))
    beside = max(1, 16 // warps)  # programs on a processor, by their registers
    stages = min(3, 1 + gpu.shared // (beside * 3 * rows * block * itemsize))  # of dy, s and the gradient of s
    return RowSettings(rows, block, warps, stages, max(1, beside * gpu.processors // cdiv(N, block)))


def row_bucket(p: Rows) -> Bucket:
    """Rows of one width to the next power of two."""
    return Bucket.of(p.rows, item=p.itemsize, width=triton.next_power_of_2(max(p.N, 16)), arrays=p.arrays)


def _lanes(gpu: Chip, s: RowSettings) -> int:
    return s.num_warps * (64 if gpu.is_amd else 32)


def forward_fits(gpu: Chip, p: Rows, s: RowSettings) -> bool:
    """Whether registers hold a tile, and a row is read once where one can be held."""
    whole = s.BLOCK_N >= p.N or p.N > _HELD
    return 64 * _lanes(gpu, s) >= s.BLOCK_ROWS * s.BLOCK_N and s.num_warps <= 16 and whole


def backward_fits(gpu: Chip, p: Rows, s: RowSettings) -> bool:
    """Whether registers hold a tile beside the sums, and shared memory the tiles on their way."""
    tile = s.BLOCK_ROWS * s.BLOCK_N
    whole = s.BLOCK_N >= p.N or p.N > _ACCUMULATED
    coming = (s.STAGES - 1) * 3 * tile * p.itemsize
    return tile <= 16 * _lanes(gpu, s) and s.num_warps <= 16 and coming <= gpu.shared and s.programs > 0 and whole


forward_choice = Choice(
    "layer_norm_forward", RowSettings, row_bucket, forward_fits, lambda gpu, p: forward_settings(gpu, p.N), reach=2
)
backward_choice = Choice(
    "layer_norm_backward", RowSettings, row_bucket, backward_fits,
    lambda gpu, p: backward_settings(gpu, p.N, p.itemsize), reach=1,
)  # fmt: skip
