"""What this machine can do at most, measured in the same run as the ops: bytes through memory, products per second."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from primer_fast.bench.op import PRECISIONS, Precision
from primer_fast.bench.timing import Clock, time_interleaved
from primer_fast.proof.native import float32_products

# Elements of the copy (bytes) and sides of the square products; float32 without tensor cores is slow, hence smaller.
_SIZES = {
    "cuda": {"copy": 1 << 30, "bfloat16": 8192, "float16": 8192, "tf32": 8192, "float32": 4096},
    "cpu": {"copy": 1 << 27, "bfloat16": 1024, "float16": 1024, "tf32": 1024, "float32": 1024},
}
SMALL = {"copy": 1 << 16, **dict.fromkeys(PRECISIONS, 32)}  # to see that it runs


@dataclass(frozen=True)
class Ceilings:
    """``copy_gbps``: GB/s, read plus written, of a large copy; ``tflops``: of a large square product, by precision."""

    copy_gbps: float
    tflops: dict[str, float]
    sizes: dict[str, int]

    def floor_ms(self, flops: float, bytes_moved: float, precision: str) -> tuple[float, str]:
        """The least time that either ceiling allows, in ms, and which it is: "TFLOP/s" or "GB/s"."""
        compute = flops / self.tflops[precision] / 1e9
        memory = bytes_moved / self.copy_gbps / 1e6
        return max((compute, "TFLOP/s"), (memory, "GB/s"))


def matmul_precision(precision: Precision) -> AbstractContextManager[None]:
    """Inside, float32 products and convolutions are computed as the precision asks."""
    return float32_products(precision.matmul)


def measure(
    device: str, precisions: list[str], clock: Clock, seconds: float = 0.3, sizes: dict[str, int] | None = None
) -> Ceilings:
    """Measure on "cpu" or "cuda" for about ``seconds`` each; inputs are random, since zeros run faster."""
    sizes = _SIZES[device] if sizes is None else sizes
    copy_ms = _copy_ms(sizes["copy"], device, clock, seconds)
    tflops = {}
    for name in precisions:
        with matmul_precision(PRECISIONS[name]):
            tflops[name] = 2 * sizes[name] ** 3 / _product_ms(sizes[name], name, device, clock, seconds) / 1e9
    return Ceilings(2 * sizes["copy"] / copy_ms / 1e6, tflops, {name: sizes[name] for name in ["copy", *precisions]})


def _copy_ms(num_bytes: int, device: str, clock: Clock, seconds: float) -> float:
    source = torch.randint(256, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _fastest_ms(lambda: target.copy_(source), clock, seconds)


def _product_ms(n: int, precision: str, device: str, clock: Clock, seconds: float) -> float:
    a, b = (torch.randn(n, n, device=device).to(PRECISIONS[precision].dtype) for _ in range(2))
    out = torch.empty_like(a)
    return _fastest_ms(lambda: torch.mm(a, b, out=out), clock, seconds)


def _fastest_ms(function: Callable, clock: Clock, seconds: float) -> float:
    function()
    timing = time_interleaved({"ceiling": function}, clock, seconds)["ceiling"]
    if isinstance(timing, Exception):
        raise timing
    return min(timing.samples)  # a ceiling is what the machine can do, not what it did while disturbed
