"""Tiles of rows in float32: parts of layer_norm."""

import math

import triton
import triton.language as tl
from torch import Tensor


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
    """What N and the strides between rows are passed in units of, so that the compiler knows their common divisor.

    Of itself it knows only whether 16 divides them.
    """
    divisor = _common(N, arrays)
    return 1 if divisor == 16 else divisor


def moves_single(N: int, *arrays: Tensor | None) -> bool:
    """Whether no two neighbours in a row can move together."""
    odd = any(t is not None and t.data_ptr() % (2 * t.element_size()) for t in arrays)
    return odd or _common(N, arrays) == 1


def _common(N, arrays):
    return math.gcd(16, N, *(t.stride(0) for t in arrays if t is not None))
