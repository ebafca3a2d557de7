"""What attention's kernels share: tiles of one head's rows, by descriptor or by pointer, and scores in base 2."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activation import tanh
from ..device import cdiv
from ..launch.descriptor import tensor_descriptor
from ..tile import LOG2_E
from .mask import attended, seen

ALIGNED = 16  # elements: Triton knows of strides and pointers whether 16 divides them


@triton.jit
def in_elements(strides, UNIT: tl.constexpr):
    """Strides between sequences, heads and rows, given in units of so many elements (see ``_stride_unit``)."""
    stride_b, stride_h, stride_row = strides
    if UNIT > 1:
        stride_b = tl.cast(stride_b, tl.int64) * UNIT
        stride_h = tl.cast(stride_h, tl.int64) * UNIT
        stride_row = tl.cast(stride_row, tl.int64) * UNIT
    return stride_b, stride_h, stride_row


@triton.jit
def load_rows(
    source, strides, b, h, row, rows, D,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, DESCRIPTOR: tl.constexpr, EVEN: tl.constexpr, MASKED: tl.constexpr,
    column=0,
):  # fmt: skip
    """Tile (BLOCK, BLOCK_D) of head (b, h) from ``row`` and ``column`` on, zero past D. No column with a descriptor.

    MASKED: zero from ``rows`` on; a descriptor does so from its tensor's end on. EVEN: no column is past D.
    """
    if DESCRIPTOR:
        tile = source.load([b, h, row, 0]).reshape(BLOCK, BLOCK_D)
    else:
        stride_b, stride_h, stride_row = strides
        offs_row = row + tl.arange(0, BLOCK)
        offs_d = column + tl.arange(0, BLOCK_D)
        source += b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h
        offsets = offs_row.to(tl.int64)[:, None] * stride_row + offs_d[None, :]
        if MASKED and EVEN:
            tile = tl.load(source + offsets, mask=offs_row[:, None] < rows, other=0.0)
        elif MASKED:
            tile = tl.load(source + offsets, mask=(offs_row[:, None] < rows) & (offs_d[None, :] < D), other=0.0)
        elif EVEN:
            tile = tl.load(source + offsets)
        else:
            tile = tl.load(source + offsets, mask=offs_d[None, :] < D, other=0.0)
    return tile


@triton.jit
def store_rows(
    target, strides, b, h, row, rows, D, tile,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, DESCRIPTOR: tl.constexpr, column=0,
):  # fmt: skip
    """Write the tile (BLOCK, BLOCK_D) to head (b, h) from ``row`` and ``column`` on, up to ``rows`` and D."""
    if DESCRIPTOR:
        target.store([b, h, row, 0], tile.to(target.dtype).reshape(1, 1, BLOCK, BLOCK_D))
    else:
        stride_b, stride_h, stride_row = strides
        offs_row = row + tl.arange(0, BLOCK)
        offs_d = column + tl.arange(0, BLOCK_D)
        target += b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h
        offsets = offs_row.to(tl.int64)[:, None] * stride_row + offs_d[None, :]
        inside = (offs_row[:, None] < rows) & (offs_d[None, :] < D)
        tl.store(target + offsets, tile.to(target.dtype.element_ty), mask=inside)


@triton.jit
def head_statistics(pointer, head, T, PAD: tl.constexpr, ADDED: tl.constexpr):
    """Where the statistics of a head's queries begin, see ``attention_statistics``."""
    return pointer + head.to(tl.int64) * (tl.cdiv(T, PAD) + 1) * ((3 if ADDED else 2) * PAD)


@triton.jit
def query_statistics(pointer, m, BLOCK: tl.constexpr, PAD: tl.constexpr, ADDED: tl.constexpr):
    """Pointers to lse of a tile of queries from m >= 0 on. delta lies PAD elements further. PAD: a power of two."""
    before = (m & -PAD) * 2 if ADDED else m & -PAD
    return pointer + tl.multiple_of(m + before, BLOCK) + tl.arange(0, BLOCK)


@triton.jit
def products_of_rows(
    a, strides_a, h_a, row_a, rows_a, b, strides_b, h_b, row_b, rows_b, batch, D,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
    MASKED_A: tl.constexpr, MASKED_B: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products (BLOCK_A, BLOCK_B) of two tiles' rows, both read by pointers, BLOCK_K columns at a time."""
    EVEN: tl.constexpr = D % BLOCK_K == 0
    products = tl.zeros((BLOCK_A, BLOCK_B), dtype=tl.float32)
    for d in range(0, D, BLOCK_K):
        a_tile = load_rows(a, strides_a, batch, h_a, row_a, rows_a, D, BLOCK_A, BLOCK_K, False, EVEN, MASKED_A, d)
        b_tile = load_rows(b, strides_b, batch, h_b, row_b, rows_b, D, BLOCK_B, BLOCK_K, False, EVEN, MASKED_B, d)
        products = tl.dot(a_tile, b_tile.T, products, input_precision=PRECISION)
    return products


@triton.constexpr_function
def result_width(width, columns):
    """Columns of the result that one program makes: all, or fewer where parts of split float32 take the registers."""
    return min(128, width) if columns else width


@triton.constexpr_function
def part_width(width, columns):
    """Columns of a part of the result, where ``columns`` are multiplied at a time; 0 for all."""
    return min(columns, width) if columns else width


@triton.constexpr_function
def part_count(d, columns):
    """How many parts hold d columns of a result, or those of them that one program makes."""
    return (min(128, d) + columns - 1) // columns if columns else 1


def result_programs(d: int, columns: int) -> int:
    """How many programs share the d columns of a result."""
    return cdiv(d, result_width(block_width(d), columns))


@triton.jit
def zero_parts(BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, PARTS: tl.constexpr):
    """A tile of zeros as a tuple of parts (BLOCK, BLOCK_C)."""
    parts = ()
    for _ in tl.static_range(PARTS):
        parts += (tl.zeros((BLOCK, BLOCK_C), dtype=tl.float32),)
    return parts


@triton.jit
def scaled_parts(parts, factor, PARTS: tl.constexpr):
    """Each part times a number, or times a column of numbers."""
    scaled = ()
    for i in tl.static_range(PARTS):
        scaled += (parts[i] * factor,)
    return scaled


@triton.jit
def add_products(
    parts, weights, source, strides, b, h, row, rows, column, D,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, PARTS: tl.constexpr, EVEN: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """parts + weights times the tile at ``row`` and ``column``, read by pointers, BLOCK_C columns at a time."""
    sums = ()
    for i in tl.static_range(PARTS):
        first = column + i * BLOCK_C
        tile = load_rows(source, strides, b, h, row, rows, D, BLOCK, BLOCK_C, False, EVEN, MASKED, first)
        sums += (tl.dot(weights, tile, parts[i], input_precision=PRECISION),)
    return sums


@triton.jit
def store_parts(
    target, strides, b, h, row, rows, column, D, parts,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, PARTS: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    for i in tl.static_range(PARTS):
        store_rows(target, strides, b, h, row, rows, D, parts[i], BLOCK, BLOCK_C, DESCRIPTOR, column + i * BLOCK_C)


@triton.jit
def without_padding(tile, row, length, BLOCK: tl.constexpr):
    """Zero the rows from ``length`` on, whatever stands there: 0 times NaN would be NaN."""
    return tl.where((row + tl.arange(0, BLOCK))[:, None] < length, tile, 0.0)


@triton.jit
def scores(
    products, scoring, queries, keys, first_key, bounds, T, S,
    SCALED: tl.constexpr, MASKED: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """Products of queries and keys -> scores, and the slope of the softcap (1 without one).

    scoring: scale, cap, mask, its strides between queries and between keys. scale: times log2 e, or over the softcap
    where there is one; cap: the softcap times log2 e. Both are without log2 e where a floating mask is added, and so
    are the scores, see ``in_base_2``. bounds: as ``seen`` takes them. SCALED: multiply by the scale here; else the
    caller does. MASKED: the tile holds keys that some query does not see.
    """
    scale, cap, mask_ptr, stride_mt, stride_ms = scoring
    slope = 1.0
    if cap is not None:
        if PRECISE:
            bounded = tanh(products * scale)
        else:
            bounded = 1.0 - 2.0 / (1.0 + tl.exp2(products * (2.0 * LOG2_E * scale)))
        slope = 1.0 - bounded * bounded
        products = bounded * cap
    elif SCALED:
        products = products * scale
    if mask_ptr is not None:
        products = attended(products, mask_ptr, queries, keys, first_key, stride_mt, stride_ms, T, S, MASKED)
    if MASKED:
        products = tl.where(seen(queries, keys, bounds), products, float("-inf"))
    return products, slope


class Scoring(NamedTuple):
    """How the products of queries and keys become weights. mask: expanded to (B, H, T, S), bool or floating."""

    scale: float
    softcap: float | None = None
    mask: torch.Tensor | None = None
    dropout_p: float = 0.0
    seed: torch.Tensor | None = None  # (1,) int64

    @property
    def added(self) -> bool:
        """Whether the mask is one that is added to the scores."""
        return self.mask is not None and self.mask.is_floating_point()

    def precise(self, dtype: torch.dtype) -> bool:
        """Whether the softcap takes the exact tanh. The quick one's errors in scores are 1e-7 times the softcap."""
        return dtype == torch.float32 or (self.softcap is not None and self.softcap > 1000)

    @property
    def scaled_late(self) -> bool:
        """The scale can wait for the exponential's argument, where a fused multiply-add is free."""
        return self.softcap is None and self.mask is None and self.scale > 0

    def aligned(self) -> "Scoring":
        """With rows of the mask that can be read 16 elements at a time: a copy of those that cannot, with room for it.

        Axes along which the mask is expanded are not copied, but for the last.
        """
        mask = self.mask
        if mask is None or (
            mask.shape[3] % ALIGNED == 0
            and mask.stride(3) == 1
            and all(stride % ALIGNED == 0 for stride in mask.stride()[:3])
            and mask.data_ptr() % 16 == 0
        ):
            return self
        once = mask[tuple(slice(0, 1 if stride == 0 else None) for stride in mask.stride()[:3])]
        *axes, S = once.shape
        copy = torch.empty(*axes, cdiv(S, ALIGNED) * ALIGNED, dtype=mask.dtype, device=mask.device)
        copy[..., :S].copy_(once)
        return self._replace(mask=copy.expand(*mask.shape[:3], -1))

    def arguments(self):
        """scale, cap, mask, its strides, seed, threshold and gain of dropout, as the kernels take them."""
        unit = 1.0 if self.added else LOG2_E.value
        cap = None if self.softcap is None else self.softcap * unit
        scale = self.scale * unit if self.softcap is None else self.scale / self.softcap
        mask, strides = self.mask, (0, 0, 0, 0)
        if mask is not None:
            mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
            strides = mask.stride()
        seed = self.seed if self.dropout_p > 0 else None
        gain = 1 / (1 - self.dropout_p) if self.dropout_p < 1 else 0.0
        return scale, cap, mask, strides, seed, round(self.dropout_p * 2**24), gain


def block_width(d: int) -> int:
    """Columns of a tile that holds rows of d elements."""
    return max(16, 1 << (d - 1).bit_length())


def described(t: Tensor) -> bool:
    """Whether a descriptor can move (B, H, rows, d): 16-byte strides, none of them 0."""
    (B, H, rows, d), (b, h, row, _), step = t.shape, t.stride(), 16 // t.element_size()
    return (
        (B == 1 or (b > 0 and b % step == 0))
        and (H == 1 or (h > 0 and h % step == 0))
        and (rows == 1 or (row > 0 and row % step == 0))
        and B * H * rows * d > 0
        and t.data_ptr() % 16 == 0
    )


def descriptor(t, block):
    """Over (B, H, rows, d), for tiles of ``block`` rows."""
    (B, H, rows, d), (b, h, row, _), step = t.shape, t.stride(), 16 // t.element_size()
    width = cdiv(d, step) * step  # stride of axes of one element, where any would do
    strides = [width if B == 1 else b, width if H == 1 else h, width if rows == 1 else row, 1]
    return tensor_descriptor(t, [B, H, rows, d], strides, [1, 1, block, block_width(d)])


def strides_of(tensors, described):
    """(B, H, rows, d) or None each -> a tuple with the strides of all axes but the last for each, and their unit.

    Ones for None and where a descriptor carries them, as ``described`` says of each: of a one Triton makes a constant.
    """
    moved = [t for t, by_descriptor in zip(tensors, described, strict=True) if t is not None and not by_descriptor]
    unit = _stride_unit(moved) if moved else 1
    strides = tuple(
        (1, 1, 1) if t is None or by_descriptor else tuple(stride // unit for stride in t.stride()[:3])
        for t, by_descriptor in zip(tensors, described, strict=True)
    )
    return strides, unit


def _stride_unit(tensors):
    """Elements in which kernels are given the strides of such (B, H, rows, d).

    Triton sees of a stride whether 16 elements divide it. Where 16 bytes divide all and 16 elements do not, as rows of
    40 float32, strides in units of 16 bytes say by their form that rows can be read 16 bytes at a time.
    """
    strides = [stride for t in tensors for stride in t.stride()[:3]]
    unit = 16 // tensors[0].element_size()
    divided = all(stride % unit == 0 for stride in strides)
    return unit if divided and any(stride % ALIGNED for stride in strides) else 1


def empty_like_rows(t: Tensor, width: int) -> Tensor:
    """Uninitialised (B, H, rows, width) in the order of t's axes in memory, without gaps."""
    B, H, rows, _ = t.shape
    if t.stride(1) < t.stride(2):  # (B, rows, H, width)
        return torch.empty(B, rows, H, width, dtype=t.dtype, device=t.device).transpose(1, 2)
    return torch.empty(B, H, rows, width, dtype=t.dtype, device=t.device)
