"""Time equivalent functions against each other, interleaved in one run, so that drift falls on all of them alike."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from primer_fast.bench.memory import peak_bytes

Function = Callable[[], object]

WARMUP_ROUNDS = 2  # after the caller's first call, which compiles
MIN_ROUNDS, MAX_ROUNDS = 7, 200


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call, one sample per round.

    ``exposed`` is True where the device waited for the host in at least one sample, so that device time contains it.
    """

    samples: tuple[float, ...]
    exposed: bool = False

    @property
    def low_ms(self) -> float:
        return quartiles(self.samples)[0]

    @property
    def median_ms(self) -> float:
        return quartiles(self.samples)[1]

    @property
    def high_ms(self) -> float:
        return quartiles(self.samples)[2]

    def of_one(self, count: int) -> "Timing":
        """Of one of so many calls that were timed as one."""
        return replace(self, samples=tuple(ms / count for ms in self.samples))


def wait(device: str) -> None:
    """Until all is done that was queued there."""
    if device == "cuda":
        torch.cuda.synchronize()


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile of at least one value."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else list(values) * 3


def ratio(a: Timing, b: Timing) -> float:
    """Time of ``a`` over time of ``b``: the median of the rounds' own ratios, so that a slow spell of both cancels."""
    return statistics.median(x / y for x, y in zip(a.samples, b.samples, strict=True))


def apart(a: Timing, b: Timing) -> float:
    """How far two timings of one function are apart, or could be by their scatter, as a part of the time.

    The larger of |ratio - 1| and the ratios' quartile distance over sqrt(rounds), about the median's standard error.
    """
    ratios = [x / y for x, y in zip(a.samples, b.samples, strict=True)]
    low, median, high = quartiles(ratios)
    return max(abs(median - 1), (high - low) / len(ratios) ** 0.5)


def rotated(names: list[str], round_: int) -> list[str]:
    """The order of one round: nobody is always first, and nobody always meets the machine in the same state."""
    first = round_ % len(names)
    return names[first:] + names[:first]


def time_interleaved(
    functions: dict[str, Function], clock: "Clock", seconds: float, least: int = MIN_ROUNDS
) -> dict[str, Timing | Exception]:
    """Time every function once per round for about ``seconds`` each, ``least`` rounds or more: A B C, B C A, C A B, ...

    Each function must have been called before, so that compilation is over. One that raises is timed no further; its
    exception takes the place of its timing.
    """
    samplers: dict[str, Callable[[], float]] = {}
    samples: dict[str, list[float]] = {name: [] for name in functions}
    failures: dict[str, Exception] = {}

    def play(round_: int) -> float:
        begin = time.perf_counter()
        for name in rotated(list(functions), round_):
            if name in failures:
                continue
            try:
                if name not in samplers:
                    samplers[name] = clock.sampler(functions[name])
                samples[name].append(samplers[name]())
            except Exception as error:
                failures[name] = error
        return time.perf_counter() - begin

    with _no_garbage_collection():
        warmups = range(WARMUP_ROUNDS + 1 if least > 1 else 0)
        cost = min((play(round_) for round_ in warmups), default=math.inf)
        for collected in samples.values():
            collected.clear()
        rounds = int(seconds * len(functions) / max(cost, 1e-9))
        for round_ in range(min(max(rounds, least), MAX_ROUNDS)):
            play(round_)
    return {
        name: failures.get(name) or Timing(tuple(samples[name]), getattr(samplers[name], "exposed", False))
        for name in functions
    }


@contextmanager
def _no_garbage_collection():
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class WallClock:
    """A CPU: wall time per call with warm caches. There is no queue, so host time is not a figure of its own."""

    measures = "wall time of the CPU path (plain PyTorch; no kernel runs)"

    def sampler(self, function: Function, min_ms: float = 1.0) -> Callable[[], float]:
        """A function that times enough calls to fill ``min_ms`` and returns ms per call."""
        calls = 1
        while (elapsed := self._elapsed_ms(function, calls)) < min_ms and calls < 1 << 16:
            calls = max(2 * calls, min(int(calls * min_ms / max(elapsed, 1e-6)) + 1, 16 * calls))
        return lambda: self._elapsed_ms(function, calls) / calls

    @staticmethod
    def _elapsed_ms(function: Function, calls: int) -> float:
        begin = time.perf_counter_ns()
        for _ in range(calls):
            function()
        return (time.perf_counter_ns() - begin) / 1e6

    def host_us(self, function: Function) -> float | None:
        return None

    def peak_bytes(self, function: Function) -> int | None:
        return peak_bytes(function, "cpu")


class DeviceClock:
    """A CUDA GPU: device time by events, with the L2 cache flushed before every call, and host time apart from it."""

    measures = "device time by CUDA events, L2 flushed before each call; host time of an un-synchronised queue"

    def __init__(self):
        l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._flush = torch.empty(4 * l2_bytes, dtype=torch.uint8, device="cuda")
        self._cycles_per_ms = self._measure_cycles_per_ms()

    @staticmethod
    def _measure_cycles_per_ms(cycles: int = 4_000_000, most: int = 100) -> float:
        """Measured until two in a row agree: an idle GPU's clock takes a while to rise."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        last = math.inf
        for _ in range(most):
            start.record()
            torch.cuda._sleep(cycles)
            end.record()
            end.synchronize()
            elapsed = start.elapsed_time(end)
            if abs(elapsed - last) <= 0.02 * elapsed:
                break
            last = elapsed
        return cycles / elapsed

    def sampler(self, function: Function) -> "_DeviceSampler":
        return _DeviceSampler(function, self._before_call)

    def _before_call(self, cover_ms: float) -> None:
        self._flush.zero_()
        torch.cuda._sleep(int(cover_ms * self._cycles_per_ms))

    def host_us(self, function: Function, repeats: int = 5, calls: int = 10) -> float:
        """Host microseconds per call: the queue stays short enough (about 1,000 launches fit) never to block."""
        measured = []
        for _ in range(repeats):
            torch.cuda.synchronize()
            begin = time.perf_counter_ns()
            for _ in range(calls):
                function()
            measured.append((time.perf_counter_ns() - begin) / 1e3 / calls)
        torch.cuda.synchronize()
        return statistics.median(measured)

    def peak_bytes(self, function: Function) -> int:
        """The most that was allocated during one call beyond what was there before it, outputs included."""
        return peak_bytes(function, "cuda")


class _DeviceSampler:
    """Device ms of one call. The device first sleeps until the host has queued the whole call.

    Otherwise a call of many small kernels, or one with an autograd graph to build, would be timed at the host's pace.
    """

    LONGEST_COVER_MS = 20.0

    def __init__(self, function: Function, before_call: Callable[[float], None]):
        self._function = function
        self._before_call = before_call
        self._cover_ms = 0.1
        self.exposed = False

    def __call__(self) -> float:
        while True:
            elapsed_ms, covered = self._call()
            if covered or self.exposed:
                return elapsed_ms
            if self._cover_ms >= self.LONGEST_COVER_MS:  # the function itself waits for the device
                self.exposed = True
                self._cover_ms = 0.1
                return elapsed_ms
            self._cover_ms *= 2

    def _call(self) -> tuple[float, bool]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._before_call(self._cover_ms)
        start.record()
        self._function()
        end.record()
        covered = not start.query()  # the device had not begun when the host was done
        end.synchronize()
        return start.elapsed_time(end), covered


Clock = WallClock | DeviceClock


def clock_for(device: str) -> Clock:
    """The clock of "cpu" or "cuda"."""
    return DeviceClock() if device == "cuda" else WallClock()
