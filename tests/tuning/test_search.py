"""The timing of what is left: it finds the fastest, is not taken in by noise, and ends in time."""

import random

import pytest

from primer_fast.tuning.search import FINAL, Fastest, fastest


class Machine:
    """A clock that calls advance, by their time with noise."""

    def __init__(self, noise=0.0, seed=0):
        self.seconds, self.noise, self.calls, self.random = 0.0, noise, [], random.Random(seed)

    def sampler(self, name, milliseconds):
        def sample():
            self.calls.append(name)
            elapsed = milliseconds * (1 + self.noise * self.random.gauss(0, 1))
            self.seconds += elapsed / 1e3
            return elapsed

        return sample

    def fastest(self, times, default="default", until=float("inf")):
        samplers = {name: self.sampler(name, time) for name, time in times.items()}
        return fastest(samplers, default, until, lambda: self.seconds)


def test_the_fastest_is_found_and_the_slow_are_left_behind():
    machine = Machine()
    found = machine.fastest({"default": 10, "b": 9, "c": 30, "fast": 7, "d": 40, "e": 20, "f": 50})
    assert found == Fastest("fast", 0.007, 0.010, 0.0)
    calls = {name: machine.calls.count(name) for name in ("default", *"bcdef", "fast")}
    assert calls["c"] == calls["d"] == calls["f"] == 1 + 2, "a warm-up and the first stage"
    assert calls["e"] == 1 + 2 + 3 and calls["b"] == 1 + 2 + 3 + 5
    assert calls["fast"] == 1 + 2 + 3 + 5 + FINAL and calls["default"] == 1 + 2 + 3 + 5 + 2 * FINAL


def test_noise_is_not_a_gain():
    """Ten candidates alike, times spread by 5 %: the luckiest of them must not replace the default."""
    times = dict.fromkeys(["default", *"abcdefghi"], 1.0)
    wrong = sum(Machine(0.05, seed).fastest(times).settings != "default" for seed in range(200))
    assert wrong <= 10
    gains = {"default": 1.0, "fast": 0.7} | dict.fromkeys("abcdefgh", 1.0)
    right = sum(Machine(0.05, seed).fastest(gains).settings == "fast" for seed in range(200))
    assert right >= 190


def test_a_gain_too_small_to_matter_is_none():
    assert Machine().fastest({"default": 1.0, "a": 0.99}).settings == "default"
    assert Machine().fastest({"default": 1.0, "a": 0.97}).settings == "a"


def test_the_default_alone_is_timed():
    assert Machine().fastest({"default": 2.0}) == Fastest("default", 0.002, 0.002, 0.0)


def test_it_ends_in_time():
    machine = Machine()
    with pytest.raises(TimeoutError):
        machine.fastest({"default": 1000, **dict.fromkeys("abcdefgh", 1000)}, until=5)
    assert machine.seconds <= 5 + 10


def test_a_candidate_that_raises_is_left_behind():
    def broken():
        raise RuntimeError("misaligned address")

    machine = Machine()
    samplers = {"default": machine.sampler("default", 2), "broken": broken, "a": machine.sampler("a", 1)}
    assert fastest(samplers, "default", 1e9).settings == "a"
    with pytest.raises(RuntimeError, match="misaligned"):
        fastest({"default": broken, "a": machine.sampler("a", 1)}, "default", 1e9)
