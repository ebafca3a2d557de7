"""Check, then time, all providers of one case against each other: what turns an Op into rows."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from primer_fast.bench.ceilings import Ceilings, matmul_precision
from primer_fast.bench.op import COMPILED, EAGER, FORWARD, OURS, PRECISIONS, Op, part_pass
from primer_fast.bench.peers import failure
from primer_fast.bench.report import FAILED, WRONG, OpRow
from primer_fast.bench.timing import Clock, Timing, apart, ratio, time_interleaved, wait
from primer_fast.reference.case import Case, arguments

_AGAIN = "the same again"  # A/A: our provider a second time
HOST_MS = 2.0  # of a call that takes the device longer, the host's time says nothing


@dataclass
class Group:
    """One case of one op in one precision and pass: what the rows of one comparison have in common."""

    op: Op
    case: Case
    precision: str
    pass_name: str
    device: str

    def __str__(self) -> str:
        return f"{self.op.name} {self.case}, {self.precision}, {self.pass_name}"

    def providers(self, with_compile: bool = True) -> list[str]:
        """Names of all that can be timed here, ours first, the floor last."""
        compiled = [COMPILED] if with_compile else []
        floor = [self.op.floor.name] if self.op.floor and self.part is None else []
        return [*self.op.providers, *compiled, *floor]

    @property
    def part(self) -> str | None:
        """The array whose gradient alone is asked for; None in the passes that all ops have."""
        return next((array for array in self.op.parts if part_pass(array) == self.pass_name), None)

    @property
    def work(self) -> tuple[float, float]:
        """The operations that must be done, and the bytes that must move."""
        itemsize = PRECISIONS[self.precision].dtype.itemsize
        passes = ("forward",) if self.pass_name == FORWARD else ("forward", self.part or "backward")
        flops, moved = self.op.flops(self.case), self.op.bytes_moved(self.case, itemsize)
        return sum(flops[p] for p in passes), sum(moved[p] for p in passes)

    def row(self, provider: str, **figures) -> OpRow:
        return OpRow(self.op.name, self.case.name, self.precision, self.pass_name, provider, **figures)


@dataclass
class _Contender:
    """A provider made ready for one group: called without arguments, returns the output and then the gradients."""

    call: Callable[[], tuple[Tensor, ...]]
    compared: bool = True
    error: float | None = None
    peak_bytes: int | None = None
    failure: dict[str, str] = field(default_factory=dict)  # status and reason


def measure_group(
    group: Group, clock: Clock, ceilings: Ceilings, seconds: float, *, with_compile: bool = True
) -> list[OpRow]:
    """Rows of every provider: those that agree with eager PyTorch are timed, about ``seconds`` each.

    Raises:
        DeviceLost: a provider left the GPU unusable.
    """
    with matmul_precision(PRECISIONS[group.precision]):
        arrays = _arrays(group)
        contenders = _contenders(group, arrays, group.providers(with_compile))
        _check(group, contenders, arrays)
        for contender in contenders.values():
            contender.peak_bytes = None if contender.failure else clock.peak_bytes(contender.call)
        ready = {name: c.call for name, c in contenders.items() if not c.failure}
        if OURS in ready:
            ready[_AGAIN] = ready[OURS]
        timings = time_interleaved(ready, clock, seconds) if ready else {}
        for name, timing in timings.items():
            if isinstance(timing, Exception) and name in contenders:
                contenders[name].failure = _failed(timing, group.device)
        short = [n for n, t in timings.items() if isinstance(t, Timing) and t.median_ms < HOST_MS and n in contenders]
        host_us = {name: clock.host_us(contenders[name].call) for name in short if not contenders[name].failure}
    return _rows(group, contenders, timings, host_us, ceilings, sum(t.nbytes for t in arrays.values()))


def prepared(group: Group, provider: str) -> tuple[Callable[[], object], dict[str, str]]:
    """One provider's call, already compiled and compared with eager; its status and reason if it must not be timed."""
    with matmul_precision(PRECISIONS[group.precision]):  # Inductor's cache has an entry for each
        arrays = _arrays(group)
        contenders = _contenders(group, arrays, dict.fromkeys((EAGER, provider)))
        _check(group, contenders, arrays)
    return contenders[provider].call, contenders[provider].failure


def _arrays(group: Group) -> dict[str, Tensor]:
    generator = torch.Generator(group.device).manual_seed(0)
    arrays = group.op.arrays(group.case, PRECISIONS[group.precision].dtype, group.device, generator)
    if group.pass_name != FORWARD:
        for name, array in arrays.items():
            differentiable = array.is_floating_point() and name not in group.op.without_gradient
            array.requires_grad_(differentiable and group.part in (None, name))
    return arrays


def _contenders(group: Group, arrays: dict[str, Tensor], names: Iterable[str]) -> dict[str, _Contender]:
    floor, found = group.op.floor, {}
    for name in names:
        if floor and name == floor.name:
            found[name] = _Contender(_floor_runner(group, arrays), compared=False)
        elif name == COMPILED:
            torch._dynamo.reset()  # past 8 recompilations torch.compile silently runs eagerly
            compiled = torch.compile(group.op.providers[EAGER], fullgraph=True, dynamic=False)
            found[name] = _Contender(runner(group, compiled, arrays))
        else:
            found[name] = _Contender(runner(group, group.op.providers[name], arrays))
    return found


def runner(group: Group, function: Callable, arrays: dict[str, Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """A call of ``function``: forward without a graph, or forward and the gradients of all arrays that ask for one."""
    options = group.case.options
    leaves = [array for array in arrays.values() if array.requires_grad]
    given = arguments(arrays)
    upstream: list[Tensor] = []  # drawn at the first call, which is not timed

    def forward():
        with torch.no_grad():
            return _tensors(function(**given, **options))

    def forward_backward():
        outputs = _tensors(function(**given, **options))
        differentiable = [y for y in outputs if y.requires_grad]
        if not upstream:  # random: ones would hide a gradient that ignores it
            generator = torch.Generator(group.device).manual_seed(1)
            for y in differentiable:
                noise = torch.randn(y.shape, generator=generator, device=y.device)
                upstream.append(torch.empty_like(y).copy_(noise))  # laid out as a network would send it
        # not .backward(): it would also time the accumulation into .grad
        return *(y.detach() for y in outputs), *torch.autograd.grad(differentiable, leaves, upstream)

    return forward if group.pass_name == FORWARD else forward_backward


def _floor_runner(group: Group, arrays: dict[str, Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    floor, options = group.op.floor, group.case.options
    detached = {name: array.detach() for name, array in arrays.items()}
    upstream: list[Tensor] = []

    def forward():
        return _tensors(floor.forward(**detached, **options))

    def forward_backward():
        outputs = forward()
        if not upstream:
            upstream.append(torch.randn_like(outputs[0]))
        return *outputs, *_tensors(floor.backward(upstream[0], **detached, **options))

    return forward if group.pass_name == FORWARD else forward_backward


def _tensors(output: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


def _check(group: Group, contenders: dict[str, _Contender], arrays: dict[str, Tensor]) -> None:
    """Call every contender once and compare it with eager PyTorch."""
    tolerance = PRECISIONS[group.precision].tolerance
    reference = _called(contenders[EAGER], group.device)
    for contender in contenders.values():
        if contender.failure:
            continue
        if contender.compared and reference is None:
            reason = f"nothing to compare with: {EAGER}: {contenders[EAGER].failure['reason']}"
            contender.failure = {"status": FAILED, "reason": reason}
            continue
        outputs = _called(contender, group.device)
        if outputs is None or not contender.compared:
            continue
        contender.error = relative_error(outputs, reference)
        if not contender.error <= tolerance:  # NaN fails too
            reason = f"relative error {contender.error:.2e} against eager is over {tolerance:.0e}"
            contender.failure = {"status": WRONG, "reason": reason}
        _poison(outputs, arrays)


def _called(contender: _Contender, device: str) -> tuple[Tensor, ...] | None:
    """The contender's tensors, or None where it failed, which is noted in it."""
    try:
        outputs = contender.call()
        wait(device)
        return outputs
    except Exception as error:
        contender.failure = _failed(error, device)
        return None


def _failed(error: Exception, device: str) -> dict[str, str]:
    return dict(zip(("status", "reason"), failure(error, device), strict=True))


def relative_error(outputs: tuple[Tensor, ...], reference: tuple[Tensor, ...]) -> float:
    """The worst relative Frobenius error over the tensors; infinite where shapes, dtypes or their number differ."""
    if [(y.shape, y.dtype) for y in outputs] != [(truth.shape, truth.dtype) for truth in reference]:
        return math.inf
    errors = []
    for y, truth in zip(outputs, reference, strict=True):
        norm = torch.linalg.vector_norm(truth, dtype=torch.float32).item()
        distance = torch.linalg.vector_norm(y.float() - truth.float()).item()
        errors.append(distance / norm if norm else distance)
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def _poison(outputs: tuple[Tensor, ...], arrays: dict[str, Tensor]) -> None:
    """Overwrite results before their memory is handed out again, lest the next provider find the answer there."""
    kept = {array.untyped_storage().data_ptr() for array in arrays.values()}
    for y in outputs:
        if y.is_floating_point() and y.untyped_storage().data_ptr() not in kept:
            y.detach().fill_(math.nan)


def _rows(
    group: Group,
    contenders: dict[str, _Contender],
    timings: dict[str, Timing | Exception],
    host_us: dict[str, float | None],
    ceilings: Ceilings,
    input_bytes: int,
) -> list[OpRow]:
    flops, moved = group.work
    floor_ms, unit = ceilings.floor_ms(flops, moved, group.precision)
    work = flops / 1e9 if unit == "TFLOP/s" else moved / 1e6
    timed = {name: timings[name] for name, c in contenders.items() if not c.failure}
    again = timings.get(_AGAIN)
    noise = apart(timed[OURS], again) if OURS in timed and isinstance(again, Timing) else None
    rows = []
    for name, contender in contenders.items():
        if contender.failure:
            rows.append(group.row(name, error=_finite(contender.error), **contender.failure))
            continue
        timing = timed[name]
        row = group.row(
            name,
            median_ms=timing.median_ms,
            low_ms=timing.low_ms,
            high_ms=timing.high_ms,
            samples=len(timing.samples),
            exposed=timing.exposed,
            host_us=host_us.get(name),
            error=contender.error,
            rate=work / timing.median_ms,
            unit=unit,
            share=floor_ms / timing.median_ms,
            flops=float(flops),
            bytes_moved=float(moved),
            peak_mib=None if contender.peak_bytes is None else (contender.peak_bytes + input_bytes) / 2**20,
            noise=noise,
            versus={other: ratio(theirs, timing) for other, theirs in timed.items() if other != name},
        )
        row.targets = targets(group, row) if name == OURS and group.device == "cuda" else []
        rows.append(row)
    return rows


def _finite(error: float | None) -> float | None:
    return error if error is not None and math.isfinite(error) else None  # JSON has no infinity


def targets(group: Group, row: OpRow) -> list[dict]:
    """The op's goals that are asked for in this group, judged by a row of ours."""
    found = []
    for goal in group.op.goals:
        asked = group.pass_name in goal.passes and group.precision in goal.precisions and goal.where(group.case)
        name = goal.metric.removeprefix("versus ")
        value = row.versus.get(name) if name != goal.metric else getattr(row, goal.metric)
        if asked and value is not None:
            found.append(goal.goal.judged(value))
    return found
