"""Token embedding plus position embedding: y = weight[input] + position[position_ids].

Legend: M tokens (all axes of input together), T its last axis, V rows of the vocabulary, P positions, D features.
"""

__all__ = [
    "CASES",
    "REFERENCE",
    "bytes_moved",
    "embedding",
    "embedding_grad",
    "embedding_magnitude",
    "flops",
    "sizes",
    "values",
]

import math

import numpy as np

from primer_fast.reference.case import Case, Reference


def _positions(input, position_ids):
    ids = np.arange(input.shape[-1]) if position_ids is None else position_ids
    return np.broadcast_to(ids, input.shape)


def embedding(input, weight, padding_idx=None, *, position=None, position_ids=None):
    """input (...) integers, weight (V, D), position (P, D) -> (..., D); padding_idx matters to the gradient alone."""
    y = weight[input]
    return y if position is None else y + position[_positions(input, position_ids)]


def _scatter(dy, ids, rows):
    table = np.zeros((rows, dy.shape[-1]))
    np.add.at(table, ids.reshape(-1), dy.reshape(ids.size, dy.shape[-1]))
    return table


def embedding_grad(dy, input, weight, padding_idx=None, *, position=None, position_ids=None):
    """dy (..., D) and the forward's arguments -> gradient of each table by name; none for the row of padding_idx."""
    grads = {"weight": _scatter(dy, input, len(weight))}
    if padding_idx is not None:
        grads["weight"][padding_idx] = 0
    if position is not None:
        grads["position"] = _scatter(dy, _positions(input, position_ids), len(position))
    return grads


def embedding_magnitude(dy, input, weight, padding_idx=None, *, position=None, position_ids=None):
    """Largest sum of absolute terms behind each result by name."""
    size = None if position is None else np.abs(position)
    tables = {"position": size, "position_ids": position_ids}
    sums = {"output": embedding(input, np.abs(weight), **tables)}
    sums |= embedding_grad(np.abs(dy), input, weight, padding_idx, **tables)
    return {name: float(a.max(initial=0.0)) for name, a in sums.items()}


def values(case, rng):
    """Indices: of every row alike, unless the case's name says otherwise."""
    shape, rows = case.shapes["input"], case.shapes["weight"][0]
    own = {"input": rng.integers(0, rows, size=shape)}
    if case.name == "one_token":
        own["input"] = np.full(shape, 3)
    elif case.name == "every_row_once":
        own["input"] = rng.permutation(rows).reshape(shape)
    elif case.name == "frequent":  # runs that end inside, at and past the blocks that the backward cuts them into
        own["input"] = np.sort(rng.integers(0, rows, size=shape) ** 2 // rows)
    if "position_ids" in case.shapes:
        own["position_ids"] = rng.integers(0, case.shapes["position"][0], size=case.shapes["position_ids"])
    return own


def sizes(case):
    """Case -> M, V, D, rows of the position table that are used."""
    M, (V, D) = math.prod(case.shapes["input"]), case.shapes["weight"]
    P = case.shapes["position"][0] if "position" in case.shapes else 0
    return M, V, D, P if "position_ids" in case.shapes else min(P, *case.shapes["input"][-1:] or (1,))


def flops(case):
    """Additions by pass."""
    M, _, D, positions = sizes(case)
    return {"forward": M * D * (positions > 0), "backward": M * D * (1 + (positions > 0))}


def bytes_moved(case, itemsize):
    """Fewest bytes to move by pass: every row that is used read once, every result written once, 8 bytes an index."""
    M, V, D, positions = sizes(case)
    return {
        "forward": itemsize * D * (min(M, V) + positions + M) + 8 * M,
        "backward": itemsize * D * (M + V + positions) + 8 * M,
    }


def _case(name, why, shape, V, D, padding_idx=None, *, P=None, ids=None, index="int64", production=False, layouts=None):
    shapes = {"input": shape, "weight": (V, D)} | ({} if P is None else {"position": (P, D)})
    dtypes = {"input": index}
    if ids is not None:
        shapes["position_ids"], dtypes["position_ids"] = ids, index
    options = {} if padding_idx is None else {"padding_idx": padding_idx}
    return Case(name, why, shapes, options, layouts or {}, production, dtypes)


CASES = (
    _case("primer", "the primer's tokens and positions", (2, 5), 12, 8, P=9),
    _case("no_position", "tokens alone", (3, 7), 11, 24),
    _case("one", "every size 1", (1,), 1, 1, P=1),
    _case("scalar", "an index without an axis", (), 5, 16),
    _case("vector", "one axis, every position used", (13,), 9, 40, P=13),
    _case("odd", "D that nothing divides", (3, 11), 7, 37, P=15),
    _case("wide", "rows of several tiles, the last one partial", (2, 9), 6, 300, P=9),
    _case("characters", "a vocabulary of characters: long runs of every one", (4, 40), 65, 16, P=40),
    _case("one_token", "one index throughout: a sum over many blocks", (3, 41), 5, 20, P=41),
    _case("frequent", "runs of every length", (150,), 24, 16),
    _case("every_row_once", "no index repeats", (4, 8), 32, 16),
    _case("padding", "a row that gets no gradient", (4, 20), 6, 16, 2, P=20),
    _case("padding_from_the_end", "padding_idx counted from the end", (4, 20), 6, 16, -1),
    _case("position_ids", "a position for every token", (3, 14), 9, 24, P=6, ids=(3, 14)),
    _case("position_ids_shared", "the same positions in every row", (3, 14), 9, 24, P=16, ids=(14,)),
    _case("position_ids_per_row", "one position for a whole row", (3, 14), 9, 24, P=16, ids=(3, 1)),
    _case("int32", "indices of 32 bits", (3, 14), 9, 24, P=6, ids=(3, 14), index="int32"),
    _case("no_tokens", "an empty batch: gradients of zeros", (0, 4), 5, 16, P=4),
    _case("no_features", "rows of no elements", (3, 4), 5, 0, P=4),
    _case("transposed", "tables stored (D, V)", (3, 14), 9, 24, P=14,
          layouts={"weight": "transposed", "position": "transposed"}),
    _case("strided", "indices that are not adjacent, every second feature", (3, 14), 9, 24,
          layouts={"weight": "strided", "input": "strided"}),
    _case("offset", "tables that start off a 16-byte boundary", (3, 14), 9, 24, P=14,
          layouts={"weight": "offset", "position": "offset"}),
    _case("gpt2", "GPT-2 124M, 16 x 1024 tokens", (16, 1024), 50257, 768, P=1024, production=True),
    _case("gpt2_ids", "the same with a position for every token: padded or packed batches", (16, 1024), 50257, 768,
          P=1024, ids=(16, 1024), production=True),
    _case("characters_768", "a vocabulary of characters", (16, 1024), 65, 768, P=1024, production=True),
    _case("tokens", "tokens alone, as where positions are rotated", (16, 1024), 50257, 768, production=True),
)  # fmt: skip

REFERENCE = Reference(
    "embedding",
    embedding,
    embedding_grad,
    embedding_magnitude,
    flops,
    bytes_moved,
    CASES,
    values=values,
    descriptors=False,  # rows are gathered: there is one way to load them
)
