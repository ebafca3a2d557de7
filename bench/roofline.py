"""Where each timed row stands under the machine's measured ceilings: operations per byte, operations per second.

    attainable(intensity) = min(product ceiling, intensity x copy ceiling)
Source: Williams, Waterman & Patterson 2009, "Roofline: an insightful visual performance model for multicore
architectures".
"""

from typing import NamedTuple

from primer_fast.bench.report import Report


class Point(NamedTuple):
    op: str
    case: str
    pass_name: str
    provider: str
    intensity: float  # FLOP per byte that the op must move
    tflops: float  # TFLOP/s that it reached


def attainable(intensity: float, copy_gbps: float, tflops: float) -> float:
    """TFLOP/s that the ceilings allow at ``intensity`` FLOP/byte."""
    return min(tflops, intensity * copy_gbps / 1e3)


def ridge(copy_gbps: float, tflops: float) -> float:
    """FLOP/byte where the two ceilings meet: below it memory binds, above it arithmetic."""
    return tflops * 1e3 / copy_gbps


def points(report: Report, precision: str) -> list[Point]:
    """Of every timed row of ``precision`` whose operations and bytes are known and not 0."""
    return [
        Point(
            row.op, row.case, row.pass_name, row.provider, row.flops / row.bytes_moved, row.flops / row.median_ms / 1e9
        )
        for row in report.rows
        if row.precision == precision and row.status == "ok" and row.flops and row.bytes_moved
    ]
