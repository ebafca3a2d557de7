import pytest
import torch

from primer_fast.bench import timing
from primer_fast.bench.timing import Timing, WallClock, apart, quartiles, ratio, time_interleaved


class ScriptedClock:
    """Samples come from a script, and the order of the calls is kept."""

    def __init__(self, script):
        self.script = {name: list(values) for name, values in script.items()}
        self.order = []

    def sampler(self, function):
        def sample():
            name = function()
            self.order.append(name)
            return self.script[name].pop(0)

        return sample


@pytest.fixture
def few_rounds(monkeypatch):
    monkeypatch.setattr(timing, "MIN_ROUNDS", 5)
    monkeypatch.setattr(timing, "MAX_ROUNDS", 5)
    monkeypatch.setattr(timing, "WARMUP_ROUNDS", 0)


def test_rounds_are_interleaved_and_warm_up_is_not_counted(few_rounds):
    clock = ScriptedClock({"a": [99, 1, 5, 3, 2, 4], "b": [99, 10, 10, 10, 10, 10]})
    found = time_interleaved({"a": lambda: "a", "b": lambda: "b"}, clock, seconds=0)
    assert clock.order == list("ab" + "ab" + "ba" + "ab" + "ba" + "ab")
    assert found["a"].samples == (1, 5, 3, 2, 4)
    assert (found["a"].low_ms, found["a"].median_ms, found["a"].high_ms) == (2, 3, 4)
    assert found["b"].median_ms == 10 and quartiles([3.0]) == [3.0, 3.0, 3.0]


def test_a_function_that_raises_is_dropped_and_the_others_go_on(few_rounds):
    clock = ScriptedClock({"a": [1] * 6, "b": [2] * 2})  # b's script runs out in its third round
    found = time_interleaved({"a": lambda: "a", "b": lambda: "b"}, clock, seconds=0)
    assert isinstance(found["b"], IndexError)
    assert found["a"].samples == (1,) * 5


def test_ratio_is_taken_round_by_round():
    slow_spell = Timing((1.0, 1.0, 8.0, 8.0, 8.0)), Timing((2.0, 2.0, 16.0, 16.0, 2.0))
    assert ratio(slow_spell[1], slow_spell[0]) == 2.0
    assert slow_spell[1].median_ms / slow_spell[0].median_ms == 0.25  # what the medians alone would have said


def test_apart_counts_scatter_where_the_medians_agree():
    steady, scattered = Timing((1.0,) * 9), Timing((0.5, 0.5, 0.5, 0.5, 1.0, 2.0, 2.0, 2.0, 2.0))
    assert apart(steady, steady) == 0
    assert apart(Timing((1.1,) * 9), steady) == pytest.approx(0.1)
    assert apart(scattered, steady) == pytest.approx(1.5 / 3)


def test_wall_clock_times_a_short_function_in_batches():
    calls = []
    sample = WallClock().sampler(lambda: calls.append(1), min_ms=0.5)
    calls.clear()
    ms = sample()
    assert len(calls) > 100  # one append is far below the clock's resolution
    assert 0 < ms < 0.01


def test_wall_clock_orders_functions_by_their_work():
    small, large = torch.randn(16, 16), torch.randn(512, 512)
    functions = {"small": lambda: small @ small, "large": lambda: large @ large}
    found = time_interleaved(functions, WallClock(), seconds=0.02)
    assert ratio(found["large"], found["small"]) > 10


class FakeEvent:
    """A device whose queue is described by ``world``: how long its sleep covers, how long the host takes to queue."""

    world = None

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self): ...

    def synchronize(self): ...

    def query(self):
        return self.world["cover_ms"] < self.world["host_ms"]

    def elapsed_time(self, end):
        return 1.0 if not self.query() else self.world["host_ms"]


@pytest.mark.parametrize(("host_ms", "exposed"), [(0.01, False), (3.0, False), (1000.0, True)])
def test_device_sampler_sleeps_until_the_host_has_queued_the_call(monkeypatch, host_ms, exposed):
    FakeEvent.world = {"host_ms": host_ms, "cover_ms": 0.0}
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    calls = []
    sampler = timing._DeviceSampler(lambda: calls.append(1), lambda cover: FakeEvent.world.update(cover_ms=cover))
    assert sampler() == (host_ms if exposed else 1.0)
    assert sampler.exposed is exposed
    tried = len(calls)
    sampler()
    assert len(calls) == tried + 1  # what was learnt about the cover is kept
