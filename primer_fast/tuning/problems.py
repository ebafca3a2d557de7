"""The problems that are tuned for: the choices that the ops' benchmark cases come to, one of each bucket."""

from collections.abc import Iterable
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from primer_fast.bench import op as ops
from primer_fast.bench.ceilings import matmul_precision
from primer_fast.bench.op import OURS, PRECISIONS
from primer_fast.kernels.launch import Chip, assume_chip
from primer_fast.kernels.tunable import Bucket, watching
from primer_fast.proof.offline import offline
from primer_fast.proof.targets import Target
from primer_fast.tuning.registry import SPACES
from primer_fast.tuning.space import Space

DEFAULT_PRECISIONS = ("bfloat16", "float32")  # float16 has bfloat16's buckets


class Unit(NamedTuple):
    """An op's case in one precision of PRECISIONS: what is run in one go, forward and backward."""

    op: str
    case: str
    precision: str

    def __str__(self) -> str:
        return " ".join(self)


class Site(NamedTuple):
    """One problem of one choice, and a unit that comes to it."""

    unit: Unit
    choice: str
    problem: tuple

    @property
    def space(self) -> Space:
        return SPACES[self.choice]

    @property
    def bucket(self) -> Bucket:
        return self.space.choice.bucket(self.problem)

    def __str__(self) -> str:
        return f"{self.choice} {self.bucket}"


def units(names: Iterable[str] = (), precisions: Iterable[str] = ()) -> list[Unit]:
    """Units, the most important first: the first case of every op before the second of any, one precision at a time.

    Raises:
        ValueError: an op or a precision is unknown.
    """
    names, precisions = list(names) or ops.names(), list(precisions) or list(DEFAULT_PRECISIONS)
    if unknown := [p for p in precisions if p not in PRECISIONS]:
        raise ValueError(f"tune: dtype must be one of {', '.join(PRECISIONS)}; got {', '.join(unknown)}")
    if unknown := [name for name in names if name not in ops.names()]:
        raise ValueError(f"tune: op must be one of {', '.join(ops.names())}; got {', '.join(unknown)}")
    cases = [[(name, case.name) for case in ops.load(name).gpu_cases] for name in names]
    rounds = [unit for row in zip_longest(*cases) for unit in row if unit is not None]
    return [Unit(op, case, precision) for precision in precisions for op, case in rounds]


def arrays_of(unit: Unit, device: str) -> dict[str, Tensor]:
    """The arrays of a unit's case, those with a gradient asking for it; on "meta" without memory."""
    op = ops.load(unit.op)
    case = _case(unit)
    generator = None if device == "meta" else torch.Generator(device).manual_seed(0)
    made = op.arrays(case, PRECISIONS[unit.precision].dtype, device, generator)
    for name, array in made.items():
        array.requires_grad_(array.is_floating_point() and case.gradients and name not in op.without_gradient)
    return made


def _case(unit: Unit):
    op = ops.load(unit.op)
    return next(case for case in (*op.gpu_cases, *op.cpu_cases) if case.name == unit.case)


def run(unit: Unit, arrays: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Forward and backward: the outputs, then the gradients. Upstream gradients are the same in every call."""
    with matmul_precision(PRECISIONS[unit.precision]):
        outputs = ops.load(unit.op).providers[OURS](**arrays, **_case(unit).options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        leaves = [array for array in arrays.values() if array.requires_grad]
        if not leaves:
            return outputs
        roots = [y for y in outputs if y.requires_grad]
        generator = None if roots[0].is_meta else torch.Generator(roots[0].device).manual_seed(1)
        upstream = [torch.randn(y.shape, generator=generator, device=y.device) for y in roots]
        upstream = [torch.empty_like(y).copy_(dy) for y, dy in zip(roots, upstream, strict=True)]  # laid out as y
        return *(y.detach() for y in outputs), *torch.autograd.grad(roots, leaves, upstream)


class Trial:
    """Gives one problem the settings that are tried, and knows which launches are made with them."""

    def __init__(self, site: Site, settings: tuple | None):
        self.site, self.settings = site, settings
        self.met = self.active = False

    def __call__(self, choice, gpu: Chip, problem):
        """A watcher; see kernels/tunable.py."""
        is_it = choice is self.site.space.choice and problem == self.site.problem
        self.active = is_it and not self.met  # where it is met again, as for the next chunk, once is enough
        self.met = self.met or is_it
        return choice.chosen(gpu, problem) if not is_it else self.settings or choice.default(gpu, problem)

    def owns(self, kernel: str) -> bool:
        """Whether a launch that is made now is made with the settings."""
        return self.active and kernel in self.site.space.kernels


def sites(all_units: Iterable[Unit], gpu: Chip, target: Target) -> list[Site]:
    """The problems of the units, one of each bucket, the first that comes to it."""
    found: dict[tuple[str, Bucket], Site] = {}
    for unit in all_units:
        met: list[Site] = []  # the last one is what the next launch is made for
        launched: set[Site] = set()

        def watch(choice, gpu, problem, unit=unit, met=met):
            met.append(Site(unit, choice.name, problem))
            return choice.chosen(gpu, problem)

        def launching(kernel, met=met, launched=launched):
            if met and kernel in met[-1].space.kernels:
                launched.add(met[-1])
            return False

        with offline(target, wanted=launching), assume_chip(gpu), watching(watch):
            run(unit, arrays_of(unit, "meta"))
        for site in dict.fromkeys(met):
            if site in launched:
                found.setdefault((site.choice, site.bucket), site)
    return list(found.values())
