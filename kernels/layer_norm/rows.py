"""Rows of layer_norm: tiles of them in float32, how they are passed to kernels, and how they are cut up.

The settings are what a file has measured, and otherwise the defaults here.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..device import Chip
from ..tunable import Choice, bucket_of


@triton.jit
def load_rows(ptr, row, stride, col, inside):
    """Tile of rows in float32, zero where it is not inside."""
    return tl.load(ptr + row[:, None] * stride + col[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_columns(ptr, col, N, default: tl.constexpr):
    """A row of weights or biases (1, BLOCK_N)."""
    if ptr is None:
        values = tl.full((1, col.shape[0]), default, dtype=tl.float32)
    else:
        values = tl.load(ptr + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
    return values


def rows_of(t: Tensor, N: int) -> Tensor:
    """(..., normalised axes) -> (rows, N) with adjacent elements; a view where strides allow."""
    t = t if t.dim() == 2 and t.shape[1] == N else t.reshape(t.numel() // N, N)
    return t if N == 1 or t.stride(1) == 1 else t.contiguous()


def vector_of(t: Tensor | None) -> Tensor | None:
    return t if t is None or (t.dim() == 1 and t.is_contiguous()) else t.reshape(-1).contiguous()


def grain_of(N: int, *arrays: Tensor | None) -> int:
    """The unit in which N and the strides between rows are passed, so that the compiler knows their common divisor.

    By itself the compiler knows only whether 16 divides them.
    """
    divisor = _common(N, arrays)
    return 1 if divisor == 16 else divisor


def moves_single(N: int, *arrays: Tensor | None) -> bool:
    """Whether each element has to move on its own, as no two neighbours are aligned to move together."""
    odd = any(t is not None and t.data_ptr() % (2 * t.element_size()) for t in arrays)
    return odd or _common(N, arrays) == 1


def _common(N, arrays):
    return math.gcd(16, N, *(t.stride(0) for t in arrays if t is not None))


class RowSettings(NamedTuple):
    """How rows are cut up. A row longer than BLOCK_N is read in blocks.

    Only a backward has the last four. With CHUNK it reads rows twice, and sums over rows in tiles of
    BLOCK_ROWS x BLOCK_COLS.
    """

    BLOCK_ROWS: int
    BLOCK_N: int
    num_warps: int
    STAGES: int = 1  # tiles of rows that a walking program has on their way, itself included
    programs: int = 0  # how many walk over all rows
    CHUNK: int = 0  # rows that one program sums; 0: ``programs`` share all rows
    BLOCK_COLS: int = 0


class Rows(NamedTuple):
    """The size of a call: what its settings depend on."""

    rows: int
    N: int
    itemsize: int  # of an element, in bytes
    arrays: int = 2  # how many arrays of such rows are read or written
    single: bool = False  # each element moves on its own, and its address takes registers


_HELD = 32768  # elements of a row that a program holds
_ACCUMULATED = 8192  # elements of the longest row that a program holds beside its sums for dw and db: 16 a thread
_READ = 32768  # bytes that a program reads at once of each array, of a longer row


def forward_default(gpu: Chip, p: Rows) -> RowSettings:
    """A tile of whole rows. Longer rows come in blocks, by so few programs that L2 keeps them for the second read."""
    lanes = 64 if gpu.is_amd else 32
    block = triton.next_power_of_2(max(p.N, 16))
    if block > _HELD:
        block = _HELD // 2
    rows = max(1, 4096 // block)
    held = 64 if block == _HELD else 32  # elements a thread
    return RowSettings(rows, block, max(4, rows * block // (held * lanes)))


def backward_default(gpu: Chip, p: Rows) -> RowSettings:
    """A tile of rows that fits the registers beside the sums of dw and db.

    Longer rows come in chunks of 32 or 64. Up to 128 KB a row, dy and s of a chunk are at most 8 MB, which L2 keeps.
    """
    lanes = 64 if gpu.is_amd else 32
    N, itemsize, single = p.N, p.itemsize, p.single
    held = 8 if single else 16  # elements a thread
    block = triton.next_power_of_2(max(N, 16))
    if block > _ACCUMULATED * held // 16:
        # One program at a time on a processor, so that the first-level cache keeps its row for the second read
        block, rows = (4096, 8) if single else (_READ // itemsize, 16)
        chunk = 64 if N * itemsize <= 65536 else 32
        return RowSettings(rows, block, 1024 // lanes, 3 if itemsize == 2 else 2, CHUNK=chunk, BLOCK_COLS=512)
    rows = max(1, 128 * held // block)
    warps = max(4, rows * block // (held * lanes))
    beside = max(1, 16 // warps)  # programs on a processor, by their registers
    stages = min(3, 1 + gpu.shared // (beside * 3 * rows * block * itemsize))  # of dy, s and the gradient of s
    return RowSettings(rows, block, warps, stages, beside * gpu.processors)


def row_bucket(p: Rows) -> str:
    """Of rows of one width, rounded up to a power of two."""
    single = {"single": 1} if p.single else {}
    width = triton.next_power_of_2(max(p.N, 16))
    return bucket_of(p.rows, item=p.itemsize, width=width, arrays=p.arrays, **single)


def _lanes(gpu: Chip, s: RowSettings) -> int:
    return s.num_warps * (64 if gpu.is_amd else 32)


def forward_parts(gpu: Chip, s: RowSettings, itemsize: int) -> int:
    """Parts in which a tile is read and written: several where a thread has more than 32 elements of it.

    Loads of wider elements take more registers, so that they come in more parts.
    """
    return itemsize if 32 * _lanes(gpu, s) < s.BLOCK_ROWS * s.BLOCK_N else 1


def forward_fits(gpu: Chip, p: Rows, s: RowSettings) -> bool:
    """Whether registers hold a tile, and a row is read once where one can be held."""
    whole = s.BLOCK_N >= p.N or p.N > _HELD
    return 64 * _lanes(gpu, s) >= s.BLOCK_ROWS * s.BLOCK_N and s.num_warps <= 16 and whole


def backward_fits(gpu: Chip, p: Rows, s: RowSettings) -> bool:
    """Whether registers hold a tile beside the sums, and shared memory the tiles on their way."""
    threads = _lanes(gpu, s)
    if s.CHUNK:
        tile, arrays, held = s.BLOCK_ROWS * s.BLOCK_COLS, 2, 16 if threads <= 512 else 8
        right = p.N > _ACCUMULATED // 2 and s.BLOCK_N * p.itemsize <= 4 * held * threads and threads <= 1024
    else:
        tile, arrays, held = s.BLOCK_ROWS * s.BLOCK_N, 3, 16
        right = s.BLOCK_N >= p.N and s.programs > 0 and s.num_warps <= 16
    coming = (s.STAGES - 1) * arrays * tile * p.itemsize
    return right and 0 < tile <= held * threads and coming <= gpu.shared


forward_choice = Choice("layer_norm_forward", RowSettings, row_bucket, forward_fits, forward_default)
backward_choice = Choice(
    "layer_norm_backward", RowSettings, row_bucket, backward_fits, backward_default
)  # fmt: skip
