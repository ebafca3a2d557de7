"""Human preferences: pairs of completions of which people like one better, read or built from rated texts.

A preference file has one JSON object a line: {"prompt", "chosen", "rejected"}, with "margin" if it is known by how much
the one is better. Two texts that people rated apart are a preference too. Built in: the words of vaderSentiment's
lexicon, each rated from -4 to 4 by ten people (C.J. Hutto & E. Gilbert, "VADER", ICWSM 2014).
"""

__all__ = [
    "DRAWS",
    "FIELDS",
    "Preference",
    "RatedText",
    "load_lexicon",
    "pair_texts",
    "read_preferences",
    "read_ratings",
    "split_pairs",
    "split_texts",
    "write_preferences",
]

import json
import math
import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from primer_fast.data.lines import LARGEST, number_of, read_lines, read_objects
from primer_fast.files import replace_file

FIELDS = ("prompt", "chosen", "rejected")
DRAWS = 50  # attempts at a division of few texts


@dataclass(frozen=True)
class Preference:
    """Of two answers to a prompt, the one that people preferred."""

    prompt: str  # may be empty
    chosen: str
    rejected: str
    margin: float = 0.0  # by how much the chosen one is better, in the unit of the ratings; 0: not known


@dataclass(frozen=True)
class RatedText:
    """A text and how people rated it."""

    text: str
    rating: float  # mean over the people asked


def read_preferences(path: str | Path) -> list[Preference]:
    """The pairs of a JSON Lines file; blank lines are passed over.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not such an object, or the file holds none; the message names file, line and field.
    """
    pairs = []
    for number, row in read_objects(path):
        try:
            pairs.append(_preference(row))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if not pairs:
        raise ValueError(f"{path}: must hold at least one preference; got an empty file")
    return pairs


def write_preferences(path: str | Path, pairs: Iterable[Preference]) -> None:
    """The inverse of ``read_preferences``."""
    rows = ({field: getattr(p, field) for field in FIELDS} | ({"margin": p.margin} if p.margin else {}) for p in pairs)
    replace_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_ratings(path: str | Path) -> list[RatedText]:
    """The texts of a tab-separated file whose first line names the columns ``mean_rating`` and ``text``, among others.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing, or a line is not what it should be; the message names file, line and field.
    """
    rows = (line.split("\t") if line else [] for line in read_lines(path))
    head = next(rows, [])
    for column in ("mean_rating", "text"):
        if column not in head:
            raise ValueError(
                f"{path}, line 1: the columns must include {column}; got {', '.join(head) or 'no columns'}"
            )
    texts = []
    for number, row in enumerate(rows, start=2):
        if not row:
            continue
        if len(row) != len(head):
            raise ValueError(f"{path}, line {number}: must have {len(head)} columns; got {len(row)}")
        values = dict(zip(head, row, strict=True))
        rating = number_of(values["mean_rating"])
        if rating is None:
            got = reprlib.repr(values["mean_rating"])
            raise ValueError(
                f"{path}, line {number}: mean_rating must be a finite number, at most {LARGEST:g}; got {got}"
            )
        if not values["text"].strip():
            raise ValueError(f"{path}, line {number}: text must not be empty")
        texts.append(RatedText(values["text"].strip(), rating))
    if not texts:
        raise ValueError(f"{path}: must hold at least one rated text; got a head alone")
    return texts


def load_lexicon() -> list[RatedText]:
    """The words of vaderSentiment's lexicon that are written in the letters a to z alone, with their mean ratings.

    Raises:
        ModuleNotFoundError: vaderSentiment is not installed.
    """
    package = find_spec("vaderSentiment")
    if package is None or not package.submodule_search_locations:
        message = "the lexicon of rated words needs the package vaderSentiment: pip install 'primer-fast[demo]'"
        raise ModuleNotFoundError(message, name="vaderSentiment")
    folder = Path(package.submodule_search_locations[0])
    rows = (line.split("\t") for line in read_lines(folder / "vader_lexicon.txt"))
    found = {row[0]: float(row[1]) for row in rows if len(row) > 1 and row[0].isascii() and row[0].isalpha()}
    return [RatedText(word, rating) for word, rating in found.items() if word.islower()]


def split_texts(
    texts: Sequence[RatedText], held_out: float = 0.1, seed: int = 0
) -> tuple[list[RatedText], list[RatedText]]:
    """Texts to train on and texts held out; no text is in both. Of one that occurs twice the first rating counts.

    Raises:
        ValueError: ``held_out`` is not between 0 and 1, or a part would be empty.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"split_texts: held_out must be between 0 and 1; got {held_out}")
    ratings: dict[str, float] = {}
    for text in texts:
        ratings.setdefault(text.text, text.rating)
    unique = [RatedText(text, rating) for text, rating in ratings.items()]
    out = round(held_out * len(unique))
    if not 0 < out < len(unique):
        raise ValueError(f"split_texts: both parts need a text; got {len(unique)} texts and held_out {held_out}")
    order = np.random.default_rng(seed).permutation(len(unique))
    return [unique[i] for i in sorted(order[out:])], [unique[i] for i in sorted(order[:out])]


def pair_texts(
    texts: Sequence[RatedText],
    count: int,
    *,
    minimum_gap: float = 1.0,
    prompt: str = "",
    with_margin: bool = False,
    seed: int = 0,
) -> list[Preference]:
    """``count`` different pairs, evenly drawn from all with ratings ``minimum_gap`` apart or more; all if fewer.

    Args:
        with_margin: keep the difference of the ratings as the pair's margin.

    Raises:
        ValueError: ``count`` or ``minimum_gap`` is not positive, or no two texts are that far apart.
    """
    if count < 1 or not minimum_gap > 0:
        raise ValueError(
            f"pair_texts: count and minimum_gap must be positive; got count {count} and minimum_gap {minimum_gap}"
        )
    ordered = sorted(texts, key=lambda text: (text.rating, text.text))
    ratings = np.array([text.rating for text in ordered])
    # A tenth is no binary fraction: 1.3 - 0.3 must count as a gap of 1
    below = np.searchsorted(ratings, ratings - minimum_gap + 1e-9, side="right")  # partners of each: ordered[:below]
    ends = np.cumsum(below)
    total = int(ends[-1]) if len(ends) else 0
    if total == 0:
        raise ValueError(
            f"pair_texts: two ratings must be at least {minimum_gap:g} apart; got {len(texts)} texts, none of them so"
        )
    chosen = np.random.default_rng(seed).choice(total, size=min(count, total), replace=False)
    winners = np.searchsorted(ends, chosen, side="right")
    losers = chosen - (ends[winners] - below[winners])
    return [
        Preference(
            prompt, ordered[w].text, ordered[l].text, ordered[w].rating - ordered[l].rating if with_margin else 0.0
        )
        for w, l in zip(winners, losers, strict=True)
    ]


def split_pairs(
    pairs: Sequence[Preference], held_out: float = 0.1, seed: int = 0
) -> tuple[list[Preference], list[Preference]]:
    """Pairs to train on and pairs held out; no completion of a prompt is in both.

    Pairs that share a completion stay together. Where nearly all hang together so, completions are divided instead,
    and pairs with one in each part are dropped.

    Raises:
        ValueError: ``held_out`` is not between 0 and 1, or a part would be empty.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"split_pairs: held_out must be between 0 and 1; got {held_out}")
    rng = np.random.default_rng(seed)
    sides = [((p.prompt, p.chosen), (p.prompt, p.rejected)) for p in pairs]
    group = _components(sides)
    names = list(dict.fromkeys(group[a] for a, _ in sides))
    sizes = dict.fromkeys(names, 0)
    for a, _ in sides:
        sizes[group[a]] += 1
    out, count = set(), 0
    for i in rng.permutation(len(names)):
        if count + sizes[names[i]] <= max(1, round(held_out * len(pairs))):
            out.add(names[i])
            count += sizes[names[i]]
    if 2 * count >= held_out * len(pairs):
        parts = _divided(pairs, sides, {side: group[side] in out for side in group})
    else:
        for _ in range(DRAWS):
            drawn = rng.random(len(group)) < math.sqrt(held_out)  # then held_out of the pairs have both of theirs out
            parts = _divided(pairs, sides, dict(zip(group, drawn.tolist(), strict=True)))
            if all(parts):
                break
    if not all(parts):
        raise ValueError(f"split_pairs: both parts need a pair; got {len(pairs)} pairs and held_out {held_out}")
    return parts[0], parts[1]


def _divided(pairs: Sequence[Preference], sides: list[tuple], is_out: dict) -> tuple[list, list]:
    """The pairs with both sides in, and those with both out."""
    parts: tuple[list, list] = ([], [])
    for pair, (a, b) in zip(pairs, sides, strict=True):
        if is_out[a] == is_out[b]:
            parts[is_out[a]].append(pair)
    return parts


def _components(links: Iterable[tuple]) -> dict:
    """The connected components of a graph by union-find: each node -> one node of its component, the same for all."""
    parent: dict = {}

    def root(x):
        parent.setdefault(x, x)
        while parent[x] != x:
            parent[x] = parent[parent[x]]
            x = parent[x]
        return x

    for a, b in links:
        parent[root(a)] = root(b)
    return {x: root(x) for x in list(parent)}


def _preference(row: dict) -> Preference:
    for field in FIELDS:
        if field not in row:
            raise ValueError(f"{field} is missing; got {', '.join(row) or 'no fields'}")
        if not isinstance(row[field], str):
            raise ValueError(f"{field} must be a string; got {type(row[field]).__name__}")
    for field in ("chosen", "rejected"):
        if not row[field]:
            raise ValueError(f"{field} must not be empty")
    if row["chosen"] == row["rejected"]:
        raise ValueError(f"chosen and rejected must differ; got {row['chosen']!r} twice")
    margin = row.get("margin", 0.0)
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 <= margin <= LARGEST:
        got = reprlib.repr(margin)
        raise ValueError(f"margin must be a finite number that is not negative, at most {LARGEST:g}; got {got}")
    return Preference(row["prompt"], row["chosen"], row["rejected"], float(margin))
