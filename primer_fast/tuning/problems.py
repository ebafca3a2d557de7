"""The problems that are tuned for: the choices that the ops' benchmark cases come to, one of each bucket."""

from collections.abc import Callable, Iterable
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from primer_fast.bench import op as ops
from primer_fast.bench.ceilings import matmul_precision
from primer_fast.bench.op import EAGER, OURS, PRECISIONS
from primer_fast.bench.peers import NotAvailable
from primer_fast.kernels.device import Chip, assume_chip
from primer_fast.kernels.tunable import Variants, watching
from primer_fast.proof.offline import offline
from primer_fast.proof.targets import Target
from primer_fast.reference.case import Case, arguments
from primer_fast.tuning.registry import SPACES
from primer_fast.tuning.space import Space

DEFAULT_PRECISIONS = ("bfloat16", "float32")  # float16 has bfloat16's buckets


class TunedCase(NamedTuple):
    """An op's case in one precision of PRECISIONS: what is run in one go, forward and backward."""

    op: str
    case: str
    precision: str
    provider: str = OURS  # or another of ours, by its name in bench/<op>.py

    def __str__(self) -> str:
        return " ".join(self[: 3 if self.provider == OURS else 4])


class Decision(NamedTuple):
    """One problem of one choice, and a unit in which it is met."""

    unit: TunedCase
    choice: str
    problem: tuple
    backward: bool = False  # whether it is met in the backward

    @property
    def space(self) -> Space:
        return SPACES[self.choice]

    @property
    def bucket(self) -> str:
        return self.space.choice.bucket(self.problem)

    @property
    def variants(self) -> bool:
        """Whether ways are chosen from, not settings."""
        return isinstance(self.space.choice, Variants)

    def __str__(self) -> str:
        return f"{self.choice} {self.bucket}"


def units(names: Iterable[str] = (), precisions: Iterable[str] = ()) -> list[TunedCase]:
    """Units, the most important first: the first case of every op before the second of any, one precision at a time.

    Raises:
        ValueError: an op or a precision is unknown.
    """
    names, precisions = list(names) or ops.names(), list(precisions) or list(DEFAULT_PRECISIONS)
    if unknown := [p for p in precisions if p not in PRECISIONS]:
        raise ValueError(f"tune: dtype must be one of {', '.join(PRECISIONS)}; got {', '.join(unknown)}")
    if unknown := [name for name in names if name not in ops.names()]:
        raise ValueError(f"tune: op must be one of {', '.join(ops.names())}; got {', '.join(unknown)}")
    cases = [
        [(name, case.name, provider) for case in ops.load(name).gpu_cases for provider in _own_providers(name)]
        for name in names
    ]
    rounds = [unit for row in zip_longest(*cases) for unit in row if unit is not None]
    return [TunedCase(op, case, precision, provider) for precision in precisions for op, case, provider in rounds]


def _own_providers(name: str) -> list[str]:
    return [provider for provider in ops.load(name).providers if provider.split(",")[0] == OURS]


def arrays_of(unit: TunedCase, device: str) -> dict[str, Tensor]:
    """The arrays of a unit's case, those with a gradient asking for it; on "meta" without memory."""
    op = ops.load(unit.op)
    case = case_of(unit)
    generator = None if device == "meta" else torch.Generator(device).manual_seed(0)
    made = op.arrays(case, PRECISIONS[unit.precision].dtype, device, generator)
    for name, array in made.items():
        array.requires_grad_(array.is_floating_point() and case.gradients and name not in op.without_gradient)
    return made


def case_of(unit: TunedCase) -> Case:
    """The case that a unit names."""
    op = ops.load(unit.op)
    return next(case for case in (*op.gpu_cases, *op.cpu_cases) if case.name == unit.case)


def caller(unit: TunedCase, arrays: dict[str, Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """A call of forward and backward: the outputs, then the gradients. Upstream gradients are the same in every call.

    They are drawn at the first one, and are what the unit's dtype can hold, whatever the dtype of the arrays.
    """
    function, options = ops.load(unit.op).providers[unit.provider], case_of(unit).options
    leaves = [array for array in arrays.values() if array.requires_grad]
    given = arguments(arrays)
    upstream: list[Tensor] = []

    def call() -> tuple[Tensor, ...]:
        with matmul_precision(PRECISIONS[unit.precision]):
            outputs = function(**given, **options)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            if not leaves:
                return outputs
            roots = [y for y in outputs if y.requires_grad]
            if not upstream:
                generator = None if roots[0].is_meta else torch.Generator(roots[0].device).manual_seed(1)
                drawn = [torch.randn(y.shape, generator=generator, device=y.device) for y in roots]
                drawn = [dy.to(PRECISIONS[unit.precision].dtype) for dy in drawn]
                upstream.extend(
                    torch.empty_like(y).copy_(dy) for y, dy in zip(roots, drawn, strict=True)
                )  # laid out as y
            return *(y.detach() for y in outputs), *torch.autograd.grad(roots, leaves, upstream)

    return call


def run(unit: TunedCase, arrays: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """One call; see ``caller``."""
    return caller(unit, arrays)()


def by_torch(unit: TunedCase, arrays: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """What PyTorch's own op makes of the same numbers: of 16 bits in float32, of float32 in float64."""
    wide = torch.float64 if PRECISIONS[unit.precision].dtype == torch.float32 else torch.float32
    widened = {
        name: array.detach().to(wide if array.is_floating_point() else array.dtype).requires_grad_(array.requires_grad)
        for name, array in arrays.items()
    }
    return run(unit._replace(provider=EAGER), widened)


class Candidate:
    """Gives one problem the settings that are tried, and knows which launches are made with them."""

    def __init__(self, decision: Decision, settings: tuple | None):
        self.decision, self.settings = decision, settings
        self.met = self.active = False

    def __call__(self, choice, gpu: Chip, problem):
        """A watcher; see kernels/tunable.py."""
        is_it = choice is self.decision.space.choice and problem == self.decision.problem
        if is_it or choice.name not in self.decision.space.inside:
            self.active = is_it and not self.met  # where it is met again, as for the next chunk, once is enough
        self.met = self.met or is_it
        return choice.chosen(gpu, problem) if not is_it else self.settings or choice.default(gpu, problem)

    def owns(self, kernel: str) -> bool:
        """Whether a launch that is made now is made with the settings."""
        return self.active and kernel in self.decision.space.kernels


def decisions_of(unit: TunedCase, gpu: Chip, target: Target) -> list[Decision]:
    """The problems of a unit; none where its provider does not serve it."""
    met: dict[Decision, bool] = {}  # whether anything is launched for it
    open_: list[Decision] = []  # those that the next launch is made for

    def watch(choice, gpu, problem):
        while open_ and choice.name not in open_[-1].space.inside:
            open_.pop()
        open_.append(Decision(unit, choice.name, problem, torch._C._current_graph_task_id() != -1))
        met.setdefault(open_[-1], False)
        return choice.chosen(gpu, problem)

    def launching(kernel):
        met.update((decision, True) for decision in open_ if kernel in decision.space.kernels)
        return False

    with offline(target, wanted=launching), assume_chip(gpu), watching(watch):
        try:
            run(unit, arrays_of(unit, "meta"))
        except NotAvailable:
            return []
    return [decision for decision, launched in met.items() if launched]


def distinct(found: Iterable[Decision]) -> list[Decision]:
    """One decision of each bucket, the first."""
    firsts: dict[tuple[str, str], Decision] = {}
    for decision in found:
        firsts.setdefault((decision.choice, decision.bucket), decision)
    return list(firsts.values())
