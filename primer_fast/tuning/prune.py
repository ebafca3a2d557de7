"""What is left of the candidates before any is timed. The default is always among them, and comes first."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from primer_fast.kernels.device import Chip
from primer_fast.tuning.problems import Decision

FACTOR = 1.5  # times the best estimate
MOST = 10  # candidates that are compiled for a problem
_ALIKE = 3  # of those, with the same two block sizes
SPILLED = 16  # bytes per thread: a few addresses that are parked around a loop; a tile would be hundreds


class Compiled(NamedTuple):
    """What the compiler says of a candidate; figures are the largest of its launches."""

    settings: Any  # the candidate's
    error: str | None = None
    registers: int = 0  # per thread
    spill_bytes: int = 0  # per thread
    shared: int = 0  # bytes per program
    code: str = ""  # equal for candidates that come to the same launches
    seconds: float = 0.0  # that it took


class Pruned(NamedTuple):
    """How many candidates there were, how many fit the chip, and those that an estimate leaves."""

    candidates: int
    legal: int
    estimated: list[tuple]


def prune(decision: Decision, gpu: Chip, factor: float = FACTOR, most: int = MOST) -> Pruned:
    """Prune by what can be told without compiling."""
    choice, problem = decision.space.choice, decision.problem
    default = choice.default(gpu, problem)
    candidates = dict.fromkeys(decision.space.candidates(gpu, problem))
    legal = [s for s in candidates if s == default or choice.fits(gpu, problem, s)]
    seconds = {s: decision.space.estimate(gpu, problem, s) for s in (default, *legal)}
    return Pruned(len(candidates), len(legal), by_estimate(seconds, default, factor, most))


def by_estimate(seconds: dict[tuple, float], default: tuple, factor: float, most: int) -> list[tuple]:
    """The default, then those within ``factor`` of the best estimate, at most ``most`` in all and few of one shape.

    Of equals, the one with more in common with the default comes first.
    """
    limit = factor * min(seconds.values())
    unlike = lambda s: sum(a != b for a, b in zip(s, default, strict=True))  # noqa: E731
    ranked = sorted((s for s in seconds if s != default), key=lambda s: (float(f"{seconds[s]:.2g}"), unlike(s), s))
    chosen, of_shape = [default], Counter([default[:2]])
    for s in ranked:
        if seconds[s] <= limit and of_shape[s[:2]] < _ALIKE and len(chosen) < most:
            chosen.append(s)
            of_shape[s[:2]] += 1
    return chosen


def by_compile(compiled: Sequence[Compiled], default: tuple, shared_limit: int) -> list[tuple]:
    """Drop what does not compile or fit, spills more than the default and more than a few bytes, or is launched exactly
    as an earlier candidate.
    """
    own = next((c for c in compiled if c.settings == default), Compiled(default))
    kept, codes = [], set()
    for c in (own, *(c for c in compiled if c.settings != default)):
        good = c.error is None and c.shared <= shared_limit and c.spill_bytes <= max(SPILLED, own.spill_bytes)
        if c is own or (good and c.code not in codes):
            kept.append(c.settings)
            codes.add(c.code)
    return kept
