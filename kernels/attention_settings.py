"""How attention's kernels are cut up: what the settings depend on, and what they are where no file has better."""

from typing import NamedTuple

from .attention_tile import result_width
from .launch import Chip
from .tunable import Bucket, Choice


class TileSettings(NamedTuple):
    """Queries and keys of a tile, warps, pipeline stages.

    COLUMNS: how many of a head are multiplied at a time, read anew for each tile; 0 for all, from tiles that stay on
    the chip. Float32 is split into tf32 parts in registers, which do not hold those of a whole tile.
    """

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    COLUMNS: int = 0


class BackwardSettings(NamedTuple):
    """Tiles of the two backward kernels."""

    keys: TileSettings  # walks over queries
    queries: TileSettings  # walks over keys
    apart: bool = False  # dk and dv by programs of their own


def forward_settings(gpu: Chip, itemsize: int, width: int, descriptors: bool, simple: bool) -> TileSettings:
    """width: the larger of the two head dimensions, rounded up to a power of two. simple: no softcap, attn_mask or
    dropout, whose values need registers of more warps."""
    if itemsize == 4:
        return TileSettings(64, 64, 4, 2) if width <= 64 else TileSettings(64, 32 if simple else 16, 4, 1, 32)
    wide = {128: (128, 128, 8, 2), 256: (128, 64, 8, 2)} if descriptors else {128: (128, 64, 8, 2), 256: (64, 32, 8, 2)}
    return TileSettings(*wide.get(width, (128, 64, 4 if simple else 8, 3 if descriptors else 2)))


def backward_settings(gpu: Chip, itemsize: int, width: int, descriptors: bool, simple: bool) -> BackwardSettings:
    """width: the larger of the two head dimensions, rounded up to a power of two. simple: causality at most, and no
    grouped heads: that leaves registers for a wider step. In float32: no softcap, attn_mask or dropout."""
    if itemsize == 4:
        block_n = (32 if width > 64 else 64) // (1 if simple else 2)
        return BackwardSettings(TileSettings(32, 64, 4, 1, 32), TileSettings(64, block_n, 4, 1, 32), apart=width > 64)
    if descriptors:
        tiles = {
            128: ((64 if simple else 32, 128, 8, 2), (128, 64, 8, 2)),
            256: ((16, 64, 8, 2), (64, 32, 8, 2)),
        }
        small = ((64, 64, 4, 2), (128, 64, 4 if simple else 8, 2))
    else:
        tiles = {128: ((32, 128, 8, 2), (128, 32, 8, 2)), 256: ((32, 64, 8, 1), (64, 32, 8, 1))}
        small = ((64, 64, 4, 2), (64, 64, 4, 2))
    return BackwardSettings(*(TileSettings(*tile) for tile in tiles.get(width, small)))


class Attention(NamedTuple):
    """What a tile of attention's kernels depends on."""

    heads: int  # that programs are made for: query heads, or key heads where keys are walked from
    T: int
    S: int
    itemsize: int  # of an element, in bytes
    width: int  # the larger of the two head dimensions, rounded up to a power of two
    descriptors: bool  # operands move by tensor descriptors
    simple: bool  # see forward_settings and backward_settings
    passes: int = 1  # tensor-core products per product
    group: int = 1  # query heads that share a key head
    causal: bool = False
    window: int = 0  # keys to the left of the diagonal that are seen, 0 for all

    @classmethod
    def of(cls, q, k, v, heads, band, descriptors, simple, dot, width):
        return cls(
            heads, q.shape[2], k.shape[2], q.element_size(), width, descriptors, simple,
            3 if dot == "tf32x3" and q.element_size() == 4 else 1, q.shape[1] // k.shape[1],
            band.right is not None, 0 if band.left is None else band.left + 1,
        )  # fmt: skip

    def tile_choice(self):
        """What the default depends on."""
        return self.itemsize, self.width, self.descriptors, self.simple


def attention_bucket(p: Attention) -> Bucket:
    window = 1 << (p.window - 1).bit_length() if p.window else 0
    return Bucket.of(
        p.heads, p.T, p.S, item=p.itemsize, width=p.width, desc=p.descriptors, simple=p.simple, passes=p.passes,
        group=p.group, causal=p.causal, window=window,
    )  # fmt: skip


_HELD = 200  # accumulators per thread; the compiler has the last word when settings are searched
_HELD_SPLIT = 96  # where the parts of a split float32 need registers too


def _fits(results: int, operands: int, products: int, rows_are_keys: bool = False, whole: int = 0):
    """For a kernel that keeps ``results`` accumulators and ``operands`` tiles and makes ``products`` a step.

    whole: width to which float32 is multiplied in whole rows; 16-bit operands always are.
    """

    def fits(gpu: Chip, p: Attention, s: TileSettings) -> bool:
        kept, walked = (s.BLOCK_N, s.BLOCK_M) if rows_are_keys else (s.BLOCK_M, s.BLOCK_N)
        wide = p.itemsize == 4
        columns = wide and p.width > whole
        parts = 1 if wide and p.width > 64 else results  # then dk and dv are apart
        accumulators = parts * kept * int(result_width(p.width, s.COLUMNS)) + products * kept * walked
        if accumulators > (_HELD_SPLIT if wide else _HELD) * 32 * s.num_warps or (s.COLUMNS > 0) != columns:
            return False
        if s.COLUMNS:
            shared = (s.BLOCK_M + s.BLOCK_N) * s.COLUMNS * p.itemsize * (s.num_stages + 2)
        else:
            shared = (operands * kept + s.num_stages * 2 * walked) * p.width * p.itemsize
        shared += (products - 1) * kept * walked * p.itemsize  # the weights of the other product pass through it
        return shared + 2048 <= gpu.shared

    return fits


forward_choice = Choice(
    "attention_forward", TileSettings, attention_bucket, _fits(1, 1, 1, whole=64),
    lambda gpu, p: forward_settings(gpu, *p.tile_choice()), reach=2,
)  # fmt: skip
keys_choice = Choice(
    "attention_backward_kv", TileSettings, attention_bucket, _fits(2, 2, 2, rows_are_keys=True),
    lambda gpu, p: backward_settings(gpu, *p.tile_choice()).keys, reach=2,
)  # fmt: skip
queries_choice = Choice(
    "attention_backward_q", TileSettings, attention_bucket, _fits(1, 2, 2),
    lambda gpu, p: backward_settings(gpu, *p.tile_choice()).queries, reach=2,
)  # fmt: skip
