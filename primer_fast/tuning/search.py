"""The fastest of some functions, without timing all of them to the end: interleaved rounds with successive halving."""

import statistics
import time
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

from primer_fast.bench.timing import Timing, apart, ratio, rotated

ROUNDS = (2, 3, 5)  # of each stage; after each but the last the slower half is left behind
FINAL = 11  # of the last comparison: the best against the default, which runs twice
GAIN = 1.02  # the least that a change must gain to be written
_AGAIN = "the default again"
Sampler = Callable[[], float]  # one call -> its milliseconds


class Fastest(NamedTuple):
    """The winner, which is the default where nothing beat it beyond noise; seconds of a call."""

    settings: Any  # hashable
    seconds: float
    default_seconds: float
    noise: float  # how far two timings of the default were apart, as a part of the time
    timed: int = 0  # candidates, the default included
    refused: tuple[str, ...] = ()  # candidates that were wrong or could not be launched, and why


def fastest(
    samplers: dict[Hashable, Sampler], default: Hashable, until: float, now: Callable[[], float] = time.monotonic
) -> Fastest:
    """Time ``samplers``, the default among them, until the clock ``now`` says ``until`` or one is left.

    A sampler that raises is left behind; so is what there was no time for. The last comparison has samples of its own,
    so that a lucky one of before does not decide.

    Raises:
        TimeoutError: there was no time for the last comparison.
        Exception: whatever the default's sampler raised.
    """
    left = dict(samplers)
    for sampler in list(left):  # warm caches, and what is compiled at a first call
        _play({sampler: left[sampler]}, left, default, {})
    for rounds in ROUNDS:
        if len(left) <= 2:
            break
        samples: dict[Hashable, list[float]] = {}
        for round_ in range(rounds):
            if now() >= until:
                break
            order = rotated(list(left), round_)
            _play({name: left[name] for name in order if name in left}, left, default, samples)
        timed = sorted((name for name in left if name in samples), key=lambda name: statistics.median(samples[name]))
        keep = [name for name in timed if name != default][: max(1, len(left) // 2)]
        left = {name: left[name] for name in (default, *keep)}
    if now() >= until:
        raise TimeoutError("there was no time to compare with the default")
    challenger = next((name for name in left if name != default), None)
    finalists = {default: left[default], _AGAIN: left[default]}
    if challenger is not None:
        finalists[challenger] = left[challenger]
    samples = {}
    for round_ in range(FINAL):
        order = rotated(list(finalists), round_)
        _play({name: finalists[name] for name in order if name in finalists}, finalists, default, samples)
    timings = {name: Timing(tuple(samples[name])) for name in finalists}
    own, noise = timings[default], apart(timings[default], timings[_AGAIN])
    if challenger in timings:
        gain = ratio(own, timings[challenger])
        if gain >= max(GAIN, 1 + 2 * noise):
            return Fastest(challenger, timings[challenger].median_ms / 1e3, own.median_ms / 1e3, noise)
    return Fastest(default, own.median_ms / 1e3, own.median_ms / 1e3, noise)


def _play(round_: dict, left: dict, default: Hashable, samples: dict) -> None:
    """Call each once and note its milliseconds; those that raise are taken out of ``left``."""
    for name, sampler in round_.items():
        try:
            samples.setdefault(name, []).append(sampler())
        except Exception:
            if name in (default, _AGAIN):
                raise
            left.pop(name)
            samples.pop(name, None)
