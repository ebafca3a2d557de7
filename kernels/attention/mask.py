"""Which keys a query sees, by position and by block: what attention's kernels skip, what they mask, what they leave.

Query i sees key j where j < length and -left <= j - (i + offset) <= right. Either bound may be None. Causal attention
has right = 0; a window of w has left = w - 1. The offset is the number of keys before the first query.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..tile import LOG2_E

FAR = tl.constexpr(1 << 30)  # further than any position
_TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
# Whether the backward for keys says in any case that its first loop runs. Triton 3.6 keeps its products apart
# otherwise. Later ones need to be told with a mask and lengths alone, and what 3.9 makes of it takes some 20 registers
# more than there are.
FIRST_LOOP_RUNS = tl.constexpr(_TRITON < (3, 7))
# Whether the compiler keeps whatever stays the same over a loop in registers, even addresses of 32 slices of a tile.
INVARIANTS_KEPT = tl.constexpr(_TRITON >= (3, 9))


class Band(NamedTuple):
    """Which keys are seen by position. left, right: None or how far from the diagonal, at least 0."""

    left: int | None = None
    right: int | None = None
    offset: int = 0
    offsets: Tensor | None = None  # (B,) int, contiguous: in place of offset
    lengths: Tensor | None = None  # (B,) int, contiguous: keys from there on are not seen

    @property
    def everything(self) -> bool:
        return self.left is None and self.right is None and self.lengths is None


@triton.jit
def limits(offset, offsets_ptr, lengths_ptr, b, S):
    """Offset and number of keys of batch element b, int32."""
    length = S
    if offsets_ptr is not None:
        offset = tl.minimum(tl.maximum(tl.load(offsets_ptr + b).to(tl.int64), -FAR), FAR).to(tl.int32)
    if lengths_ptr is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths_ptr + b).to(tl.int64), 0), S).to(tl.int32)
    return offset, length


@triton.jit
def key_blocks(first, last, bounds, S, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Queries first..last -> begin, full_begin, full_end, end: the keys that they see. bounds: as ``seen`` takes them.

    [begin, full_begin) and [full_end, end) need a mask, [full_begin, full_end) none. All but end are multiples of
    BLOCK, and none is past the next. MASKED: blocks may need one.

    The first loop over blocks that a kernel runs must run: a way around it would define its sums without a product, for
    which ptxas makes every product wait for the one before it. So the last block always counts as one that needs a mask
    where any may; where no key is seen, it is the first block past the keys, which reads as zeros and is masked.
    """
    offset, length, left, right = bounds
    begin = 0
    full_begin = 0
    end = length
    full_end = length
    if right is not None:
        end = tl.minimum(length, tl.maximum(last + offset + right + 1, 0))
        full_end = tl.minimum(length, tl.maximum(first + offset + right + 1, 0))
    if left is not None:
        begin = tl.minimum(tl.maximum(first + offset - left, 0), end) // BLOCK * BLOCK
        full_begin = tl.cdiv(tl.maximum(last + offset - left, 0), BLOCK) * BLOCK
    if MASKED:
        past = tl.cdiv(S, BLOCK) * BLOCK
        end = tl.where(begin < end, end, past + 1)
        last_block = (end - 1) // BLOCK * BLOCK
        begin = tl.where(end > past, past, begin)
        full_begin = tl.maximum(tl.minimum(full_begin, last_block), begin)
        full_end = tl.maximum(tl.minimum(full_end // BLOCK * BLOCK, last_block), full_begin)
        tl.assume(full_end < end)
    else:
        tl.assume(full_begin < full_end)
    return begin, full_begin, full_end, end


@triton.jit
def query_blocks(
    first, BLOCK_KEYS: tl.constexpr, bounds, T, BLOCK: tl.constexpr, MASKED: tl.constexpr, TELL: tl.constexpr,
):  # fmt: skip
    """Keys first..first + BLOCK_KEYS - 1 -> begin, full_begin, full_end, end: the queries that see them.

    As key_blocks, but the loop that always runs is the one before the full blocks, and a block that reaches past T
    counts as full: its missing queries have no weight. Without ``left`` both ends are T itself, since a loop that ends
    at an argument keeps no register for its end. TELL: say to the compiler that the first loop runs.
    """
    offset, length, left, right = bounds
    last = tl.minimum(first + BLOCK_KEYS, length) - 1
    begin = 0
    full_begin = 0
    end = T
    full_end = T
    if left is not None:
        end = tl.minimum(T, tl.maximum(last - offset + left + 1, 0))
        seen_by = tl.maximum(first - offset + left + 1, 0)
        full_end = tl.where(seen_by < T, seen_by // BLOCK * BLOCK, tl.cdiv(T, BLOCK) * BLOCK)
    if right is not None:
        begin = tl.minimum(tl.maximum(first - offset - right, 0), end) // BLOCK * BLOCK
        full_begin = tl.cdiv(tl.maximum(last - offset - right, 0), BLOCK) * BLOCK
    if MASKED:
        past = tl.cdiv(T, BLOCK) * BLOCK
        nothing = (first >= length) | (begin >= end)
        begin = tl.where(nothing, past, begin)
        end = tl.where(nothing, past + 1, end)
        full_begin = tl.where(first + BLOCK_KEYS > length, end, tl.maximum(tl.minimum(full_begin, end), begin + 1))
        full_begin = tl.cdiv(full_begin, BLOCK) * BLOCK
        if left is not None:
            full_end = tl.minimum(tl.maximum(full_end, full_begin), tl.maximum(end, full_begin))
        if TELL:
            tl.assume(begin < full_begin)
    else:
        if left is not None:
            full_end = tl.minimum(full_end, end)
        tl.assume(full_begin < full_end)
    return begin, full_begin, full_end, end


@triton.jit
def seen(queries, keys, bounds):
    """Positions that broadcast against one another -> bool: the query sees the key.

    bounds: offset, length, left, right, as on top of this file.
    """
    offset, length, left, right = bounds
    visible = keys < length
    if right is not None:
        visible = visible & (keys <= queries + offset + right)
    if left is not None:
        visible = visible & (keys >= queries + offset - left)
    return visible


@triton.jit
def attended(scores, mask_ptr, queries, keys, first, stride_t, stride_s, T, S, MASKED: tl.constexpr):
    """Scores with an attn_mask: uint8, 0 takes out, or floating, added to them as they are, see ``in_base_2``.

    first: the first of ``keys``. MASKED: some may be past S. Its rows are aligned (``Scoring.aligned``), so that many
    elements are loaded at a time: the addresses of single ones would fill the registers.
    """
    inside = queries < T
    if MASKED:
        inside = inside & (keys < tl.cdiv(S, 16) * 16)
    mask_ptr += tl.cast(first, tl.int64) * stride_s
    offsets = queries.to(tl.int64) * stride_t + (keys - first).to(tl.int64) * stride_s
    mask = tl.load(mask_ptr + offsets, mask=inside, other=0)
    if mask_ptr.dtype.element_ty == tl.uint8:
        scores = tl.where(mask != 0, scores, float("-inf"))
    else:
        scores += mask.to(tl.float32)
    return scores


@triton.jit
def in_base_2(difference, ADDED: tl.constexpr):
    """A difference of two scores -> what exp2 takes of it.

    Scores are in base 2, but not where a mask is ADDED. The least float32 times log2 e would be -inf, and a query whose
    keys all have that mask would look as if it saw none.
    """
    if ADDED:
        difference *= LOG2_E
    return difference


@triton.jit
def kept(seed, head, query, key, threshold, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """Dropout's choice for a tile (QUERIES, KEYS) at (query, key): the same for an element in whatever tile it lies.

    threshold: 2^24 times the probability to drop. One Philox counter serves four adjacent keys.
    """
    zero = tl.zeros((QUERIES, KEYS // 4), dtype=tl.int32)
    quads = zero + (key // 4 + tl.arange(0, KEYS // 4))[None, :]
    rows = zero + (query + tl.arange(0, QUERIES))[:, None]
    a, b, c, d = tl.philox(seed, quads, rows, zero + head, zero, n_rounds=7)
    bits = tl.join(tl.join(a, c), tl.join(b, d)).reshape(QUERIES, KEYS)  # a b c d of each quad in turn
    return (bits >> 8).to(tl.int32) >= threshold
