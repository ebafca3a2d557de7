"""What is searched for one choice of settings, and the estimate of kernels that are bound by memory."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from primer_fast.kernels.device import Chip, cdiv
from primer_fast.kernels.tunable import Choice

_LATENCY = 0.8e-6  # of a load from device memory
_PROGRAM_SECONDS = 1e-6  # beginning and end of one program
_REGISTERS, _WARPS = 65536, 64  # of a processor


class Space(NamedTuple):
    """The candidates of one choice."""

    choice: Choice
    kernels: tuple[str, ...]  # what is launched with the settings, by name
    candidates: Callable[[Chip, tuple], Iterable[tuple]]  # whether they fit or not
    estimate: Callable[[Chip, tuple, tuple], float]  # seconds
    inside: tuple[str, ...] = ()  # choices that are asked on the way to those launches, by name
    late: bool = False  # searched after the other choices of a case


def seconds_to_move(
    gpu: Chip, moved: float, programs: int, in_flight: float, warps: int, registers: float, shared: float = 0
) -> float:
    """Seconds to move so many bytes by programs that have ``in_flight`` bytes each on their way at a time.

    Memory gives its bandwidth to as many bytes in flight as it moves in its latency (Little's law). warps, registers
    (a thread), shared: of one program.
    """
    lanes = 64 if gpu.is_amd else 32
    by_registers = _REGISTERS // max(1, int((24 + registers) * warps * lanes))
    resident = max(1, min(_WARPS // warps, by_registers, int(gpu.shared // max(shared, 1)), 32))
    slots = gpu.processors * resident
    waves = cdiv(programs, slots)
    concurrent = programs / waves  # on average over the waves, the last of which may be short
    bandwidth = gpu.bandwidth * 1e12
    rate = min(0.9 * bandwidth, concurrent * in_flight / _LATENCY)
    return moved / rate + waves * _PROGRAM_SECONDS
