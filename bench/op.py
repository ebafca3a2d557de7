"""What a benchmark file declares about its op, and how the harness finds those files."""

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from primer_fast import functional
from primer_fast.bench.peers import PEERS
from primer_fast.bench.report import OURS, Goal
from primer_fast.proof import verify
from primer_fast.proof.inputs import allocate
from primer_fast.reference.case import Case
from primer_fast.reference.ops import OPS

EAGER, COMPILED = "torch", "torch.compile"
FORWARD, FORWARD_BACKWARD = "forward", "forward+backward"
PASSES = (FORWARD, FORWARD_BACKWARD)


def part_pass(array: str) -> str:
    """Name of the pass that computes the output and the gradient of one array."""
    return f"{FORWARD}+d{array}"


@dataclass(frozen=True)
class Precision:
    """The dtype of the tensors and, for float32, what torch.set_float32_matmul_precision is set to."""

    dtype: torch.dtype
    matmul: str
    tolerance: float  # relative Frobenius error against eager PyTorch; float32's is one that tf32 products miss


# In order of importance: a run that is short of time drops the last first.
PRECISIONS = {
    "bfloat16": Precision(torch.bfloat16, "highest", 2e-2),
    "float32": Precision(torch.float32, "highest", 5e-5),
    "float16": Precision(torch.float16, "highest", 5e-3),
    "tf32": Precision(torch.float32, "high", 2e-3),
}


@dataclass(frozen=True)
class Floor:
    """The least work that any implementation must do, without the op's own arithmetic: timed, never compared.

    Both functions take the op's arrays and options; ``backward`` takes the gradient of the output before them.
    """

    name: str
    forward: Callable
    backward: Callable


@dataclass(frozen=True)
class OpGoal:
    """A bound on one figure of our rows on a GPU, in the passes, precisions and cases where it is asked for.

    ``metric`` is "share", "host_us" or another figure of a row, or "versus <provider>" (that provider's median over
    ours).
    """

    metric: str
    at_least: float = -math.inf
    at_most: float = math.inf
    passes: Sequence[str] = PASSES
    precisions: Sequence[str] = tuple(PRECISIONS)
    where: Callable[[Case], bool] = lambda case: True

    @property
    def goal(self) -> Goal:
        bounds = [f">= {self.at_least:g}" if math.isfinite(self.at_least) else ""]
        bounds += [f"<= {self.at_most:g}" if math.isfinite(self.at_most) else ""]
        return Goal(" ".join([self.metric, *filter(None, bounds)]), self.at_least, self.at_most)


HOST_GOAL = OpGoal("host_us", at_most=25, passes=[FORWARD])


def production(cases: Sequence[Case]) -> list[Case]:
    """The cases of a GPU's size, in the order in which a reference declares them."""
    return [case for case in cases if case.production]


def named(name: str) -> Callable[[Case], bool]:
    """For ``OpGoal.where``: the case of this name alone."""
    return lambda case: case.name == name


def random_arrays(
    op: str, case: Case, dtype: torch.dtype, device: str, generator: torch.Generator | None
) -> dict[str, Tensor]:
    """Arrays of the case's shapes, layouts and dtypes; on "meta" without memory, and without a generator.

    They are normal, but for those that the op's reference draws itself, such as indices, masks and lengths. A weight of
    two axes or more has variance 1 / fan-in, as when initialised.
    """
    own, arrays = OPS[op].values(case, np.random.default_rng(0)), {}
    for name, shape in case.shapes.items():
        kind = getattr(torch, case.dtypes[name]) if name in case.dtypes else dtype
        if name in own:
            values = torch.from_numpy(np.array(own[name]))
        else:
            scale = (shape[0] / math.prod(shape)) ** 0.5 if name.startswith("weight") and math.prod(shape) else 1.0
            values = torch.randn(shape, generator=generator, device=device).mul_(scale)
        arrays[name] = allocate(shape, case.layouts.get(name), kind, device).copy_(values)
    return arrays


@dataclass(frozen=True)
class Op:
    """One op's benchmark. Providers are called as ``f(**arguments(arrays), **options)`` and compute the same.

    ``flops(case)`` and ``bytes_moved(case, itemsize)`` return ``dict(forward=..., backward=...)``: the operations that
    must be done and the bytes that must pass through device memory; with ``parts``, also by the name of each part.
    ``torch.compile`` of the eager provider is added by the harness; a provider that cannot run (not installed, out of
    memory) is reported, not fatal.
    """

    name: str
    providers: dict[str, Callable]  # OURS and EAGER among them
    gpu_cases: Sequence[Case]  # in order of importance
    cpu_cases: Sequence[Case]
    flops: Callable[[Case], dict[str, float]]
    bytes_moved: Callable[[Case, int], dict[str, float]]
    floor: Floor | None = None
    goals: Sequence[OpGoal] = ()
    parts: Sequence[str] = ()  # arrays whose gradient is also timed alone, after a forward
    draw: Callable[..., dict[str, Tensor]] = random_arrays  # called as that is
    without_gradient: Sequence[str] = ()  # arrays of floats that get none

    def arrays(self, case: Case, dtype: torch.dtype, device: str, generator: torch.Generator | None):
        """The arrays of a case by name; see ``random_arrays``."""
        return self.draw(self.name, case, dtype, device, generator)

    def passes(self, chosen: Sequence[str] = PASSES) -> list[str]:
        """``chosen``, and after a backward the gradients that are timed alone."""
        return [*chosen, *(part_pass(part) for part in self.parts if FORWARD_BACKWARD in chosen)]

    def with_smallest_case(self) -> "Op":
        """This op with its smallest case alone, on any device."""
        return replace(self, gpu_cases=self.cpu_cases[-1:], cpu_cases=self.cpu_cases[-1:])

    def cases(self, device: str) -> Sequence[Case]:
        return self.gpu_cases if device == "cuda" else self.cpu_cases


def declare(name: str, *, beside: Mapping[str, Callable] = MappingProxyType({}), **declared) -> Op:
    """The benchmark of an op of the library; what is not declared comes from its reference and from ``PEERS``.

    Args:
        beside: other providers, by name.
    """
    reference = OPS[name]
    ours = {OURS: getattr(functional, name), EAGER: verify.plain(name)}
    usual = {
        "providers": ours | dict(beside) | PEERS.get(name, {}), "gpu_cases": production(reference.cases),
        "flops": reference.flops, "bytes_moved": reference.bytes_moved, "without_gradient": reference.without_gradient,
    }  # fmt: skip
    return Op(name=name, **usual | declared)


def names() -> list[str]:
    """The ops: each has a benchmark in bench/<op>.py."""
    return list(OPS)


def load(name: str) -> Op:
    """The ``OP`` of bench/<name>.py.

    Raises:
        ValueError: there is no such benchmark.
    """
    if name not in names():
        raise ValueError(f"bench: op must be one of {', '.join(names())}; got {name!r}")
    return importlib.import_module(f"primer_fast.bench.ops.{name}").OP
