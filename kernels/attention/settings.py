"""How attention's kernels are cut up: what the settings depend on, and what they are where no file has better."""

from typing import NamedTuple

from ..device import Chip, passes
from ..tunable import Choice, bucket_of
from .mask import INVARIANTS_KEPT
from .tile import result_width


class AttentionSettings(NamedTuple):
    """Queries and keys of a tile, warps, pipeline stages.

    COLUMNS: 0, or how many columns of a head are multiplied at a time. With 0 a program keeps its rows on the chip;
    otherwise it reads these columns again for each tile that it walks over. Float32 needs that: it is split into tf32
    parts in registers, which do not hold the parts of a whole tile.
    """

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    COLUMNS: int = 0


class BackwardSettings(NamedTuple):
    """Tiles of the two backward kernels."""

    keys: AttentionSettings  # walks over queries
    queries: AttentionSettings  # walks over keys
    apart: bool = False  # dk and dv by programs of their own


# What a score goes through takes registers of its own, beside the tile's. Weights of them, in no unit: settings were
# compiled for sm_90 with Triton 3.6, 3.7 and 3.9 and chosen where none spills.
_SCORED = {"softcap": 3, "mask": 3, "dropout": 4, "lengths": 1, "grouped": 1}
PLAIN = 2  # lengths and grouped heads at most: scores are scaled and nothing else


def burden_of(scoring, lengths: bool, grouped: bool) -> int:
    """The weights of all that scores go through, added up.

    grouped: whether a window or grouped heads give the backward more loops.
    """
    there = {
        "softcap": scoring.softcap is not None, "mask": scoring.mask is not None, "dropout": scoring.dropout_p > 0,
        "lengths": lengths, "grouped": grouped,
    }  # fmt: skip
    # A mask costs more beside a length, and where its addresses change with the head
    mixed = there["mask"] and (lengths or grouped)
    return sum(weight for name, weight in _SCORED.items() if there[name]) + mixed


class AttentionProblem(NamedTuple):
    """What the settings of attention's kernels depend on."""

    heads: int  # in all sequences: of keys where programs own keys, otherwise of queries
    T: int
    S: int
    itemsize: int  # of an element, in bytes
    width: int  # the larger of the two head dimensions, rounded up to a power of two
    descriptors: bool  # operands move by tensor descriptors
    burden: int  # of what scores go through, see ``burden_of``
    passes: int = 1  # tensor-core products per product
    group: int = 1  # query heads that share a key head
    causal: bool = False
    window: int = 0  # keys to the left of the diagonal that are seen, 0 for all

    @classmethod
    def of(cls, q, k, v, heads, band, descriptors, burden, dot, width):
        return cls(
            heads, q.shape[2], k.shape[2], q.element_size(), width, descriptors, burden,
            passes(dot, q.element_size()), q.shape[1] // k.shape[1],
            band.right is not None, 0 if band.left is None else band.left + 1,
        )  # fmt: skip


def forward_default(gpu: Chip, p: AttentionProblem) -> AttentionSettings:
    itemsize, width, descriptors, burden = p.itemsize, p.width, p.descriptors, p.burden
    plain = burden <= PLAIN
    if itemsize == 4:
        if width <= 64:
            return AttentionSettings(64, 64 if burden < _SCORED["dropout"] else 32, 4, 2)
        return AttentionSettings(64, 32 if plain else 16, 4, 1, 32)
    if not descriptors:
        scored = (128, 32, 8, 2) if gpu.is_amd else (64, 64, 8, 2)
        wide = {128: (128, 64, 8, 2) if plain else scored, 256: (64, 32, 8, 2)}
        return AttentionSettings(*wide.get(width, (128, 64, 4 if plain else 8, 2)))
    if width <= 64:
        return AttentionSettings(128, 64, 4 if plain else 8, 3)
    tiles = {
        128: ((3, (128, 128, 8, 2)), (9, (128, 64, 8, 2)), (99, (128, 32, 8, 2))),
        256: ((3, (128, 64, 8, 2)), (6, (128, 32, 8, 2)), (99, (64, 32, 8, 2))),
    }
    if width == 256 and burden == _SCORED["lengths"]:
        burden = 6  # values past a length are zeroed on their way through registers
    if width == 128 and burden == 3 and gpu.arch == "sm_100":
        burden = 9  # this tile alone spills less there
    return _first(tiles[width], burden)


def _first(tiles, burden: int) -> AttentionSettings:
    """The first of the tiles that can carry the burden; each stands beside the most that it can."""
    return next(AttentionSettings(*tile) for most, tile in tiles if burden <= most)


def backward_default(gpu: Chip, p: AttentionProblem) -> BackwardSettings:
    """Tiles, and whether dk and dv come from programs of their own.

    Two programs multiply five times where one that makes both multiplies four times, but each holds one accumulator.
    They are faster where one program would have room for steps of only 16 or 32 queries: products of so few rows read
    shared memory for longer than they multiply.
    """
    itemsize, width, descriptors, burden = p.itemsize, p.width, p.descriptors, p.burden
    if itemsize == 4:
        block_n = (32 if width > 64 else 64) // (1 if burden <= PLAIN else 2)
        apart = width > 64 or burden > _SCORED["dropout"]
        return BackwardSettings(AttentionSettings(32, 64, 4, 1, 32), AttentionSettings(64, block_n, 4, 1, 32), apart)
    if not descriptors:  # addresses take registers too: half the tile where scores go through anything
        tiles = {
            64: ((32 if burden > PLAIN else 64, 64, 4, 2), (64, 64, 4, 2)),
            128: ((32 if burden or gpu.is_amd else 64, 64, 8, 2), (64 if burden > PLAIN else 128, 32, 8, 2)),
            256: ((32, 64, 8, 1), (32 if burden > PLAIN else 64, 32, 8, 1)),
        }
        if gpu.is_amd:
            tiles[256] = (16, 64, 8, 1), (32 if burden > PLAIN else 64, 16, 8, 1)
            if burden > PLAIN:
                tiles[128] = (32, 64, 8, 2), (64, 16, 8, 2)
        return BackwardSettings(*(AttentionSettings(*tile) for tile in tiles[max(width, 64)]))
    if width <= 64:
        keys = ((4, (64, 64, 4, 2)), (99, (32, 64, 4, 2)))
        queries = ((0, (128, 64, 4, 2)), (99, (128, 64, 8, 2)))
    elif width == 128:
        keys = ((0, (64, 128, 8, 2)), (7, (32, 128, 8, 2)), (99, (32, 64, 8, 2)))
        queries = ((6, (128, 64, 8, 2)), (9, (128, 32, 8, 2)), (99, (64, 32, 8, 2)))
    else:
        most = PLAIN if gpu.arch == "sm_100" else 5 if INVARIANTS_KEPT.value else 99
        keys = ((1, (32, 128, 8, 2)), (most, (32, 64, 8, 2)), (99, (16, 64, 8, 2)))
        queries = ((0, (128, 32, 8, 2)), (99, (64, 32, 8, 2)))
    apart = width == 256 or (width == 128 and burden >= 5)
    if width == 256 and burden > PLAIN and gpu.arch == "sm_100":
        apart = False  # where both together spill less
    return BackwardSettings(_first(keys, burden), _first(queries, burden), apart)


def attention_bucket(p: AttentionProblem) -> str:
    window = 1 << (p.window - 1).bit_length() if p.window else 0
    return bucket_of(
        p.heads, p.T, p.S, item=p.itemsize, width=p.width, desc=p.descriptors, burden=p.burden, passes=p.passes,
        group=p.group, causal=p.causal, window=window,
    )  # fmt: skip


_HELD = 200  # accumulators per thread; the compiler has the last word when settings are searched
_HELD_SPLIT = 96  # where the parts of a split float32 need registers too


def _fits(results: int, operands: int, products: int, rows_are_keys: bool = False, whole: int = 0):
    """Whether registers and shared memory hold a tile of a kernel.

    The kernel keeps ``results`` accumulators and ``operands`` tiles, and makes ``products`` in each step.
    whole: largest head width whose float32 rows are multiplied in one piece; 16-bit rows always are.
    """

    def fits(gpu: Chip, p: AttentionProblem, s: AttentionSettings) -> bool:
        kept, walked = (s.BLOCK_N, s.BLOCK_M) if rows_are_keys else (s.BLOCK_M, s.BLOCK_N)
        wide = p.itemsize == 4
        columns = wide and p.width > whole
        apart = rows_are_keys and backward_default(gpu, p).apart
        parts = 1 if apart else results
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
    "attention_forward", AttentionSettings, attention_bucket, _fits(1, 1, 1, whole=64), forward_default
)  # fmt: skip
keys_choice = Choice(
    "attention_backward_kv", AttentionSettings, attention_bucket, _fits(2, 2, 2, rows_are_keys=True),
    lambda gpu, p: backward_default(gpu, p).keys,
)  # fmt: skip
queries_choice = Choice(
    "attention_backward_q", AttentionSettings, attention_bucket, _fits(1, 2, 2),
    lambda gpu, p: backward_default(gpu, p).queries,
)  # fmt: skip
