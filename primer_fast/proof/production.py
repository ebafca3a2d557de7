"""The cases that launch on a GPU, compiled ahead of time: one row per kernel launch of their forward and backward."""

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch

from primer_fast import functional
from primer_fast.kernels.device import Chip, assume_chip
from primer_fast.proof.hot_loop import epilogue_per_element
from primer_fast.proof.inputs import allocate
from primer_fast.proof.offline import Launch, offline, refuse_interpreter
from primer_fast.proof.resources import Resources
from primer_fast.proof.targets import TARGETS, target_of
from primer_fast.proof.verify import DTYPES, ops
from primer_fast.reference.case import Case, arguments
from primer_fast.reference.ops import OPS


@dataclass(frozen=True)
class CompiledLaunch:
    """One kernel launch of one case."""

    op: str
    case: str
    dtype: str
    target: str
    direction: str  # "forward" or "backward"
    kernel: str
    programs: int  # in the grid
    constexprs: dict  # tile sizes and what else the kernel is specialised on
    warps: int | None
    stages: int | None
    resources: Resources | None  # None where ``error`` says why, or where nothing was compiled
    error: str | None = None
    serialized: bool | None = None  # each wgmma waits for the one before; None where the target has no wgmma
    epilogue: float | None = None  # instructions for each element of a product's tile, see proof/hot_loop.py
    code: str | None = None  # a digest of what decides the machine code, see proof/offline.py

    def as_dict(self) -> dict:
        return asdict(self)


class CaseOnTarget(NamedTuple):
    """What is compiled in one go."""

    op: str
    case: Case
    dtype: str
    target: str


def cases_to_compile(
    names: Iterable[str] = (),
    case_names: Iterable[str] = (),
    dtypes: Iterable[str] = (),
    targets: Iterable[str] = ("sm_90",),
) -> list[CaseOnTarget]:
    """What there is to compile; nothing named means all ops, their production cases, all dtypes.

    Raises:
        ValueError: an op, case, dtype or target is unknown; the message lists those there are.
    """
    names, case_names, dtypes, targets = (
        list(names) or ops(),
        list(case_names),
        list(dtypes) or list(DTYPES),
        list(targets),
    )
    _check_known("op", names, ops())
    cases = {op: (*OPS[op].cases, *OPS[op].drawn) for op in names}
    _check_known("case", case_names, {case.name for there in cases.values() for case in there})
    _check_known("dtype", dtypes, DTYPES)
    _check_known("target", targets, TARGETS)
    chosen = [(op, c) for op in names for c in cases[op] if (c.name in case_names if case_names else c.production)]
    return [CaseOnTarget(op, case, dtype, target) for target in targets for dtype in dtypes for op, case in chosen]


def _check_known(what: str, asked: list[str], there: Iterable[str]) -> None:
    unknown = [name for name in asked if name not in there]
    if unknown:
        raise ValueError(f"kernels: {what} must be one of {', '.join(sorted(there))}; got {', '.join(unknown)}")


def compile_units(units: list[CaseOnTarget], jobs: int = 2) -> Iterator[list[CompiledLaunch]]:
    """The rows of each unit in turn, compiled in ``jobs`` processes; in this one where ``jobs`` is 1.

    Raises:
        RuntimeError: TRITON_INTERPRET=1 was set when Triton was imported.
    """
    refuse_interpreter()
    if jobs == 1:
        yield from map(compile_unit, units)
        return
    context = multiprocessing.get_context("spawn")  # torch and Triton have threads: no fork
    pool = ProcessPoolExecutor(jobs, context, initializer=end_with_parent)
    try:
        yield from pool.map(compile_unit, units)
    finally:
        pool.shutdown(cancel_futures=True)


def end_with_parent() -> None:
    """In a worker: end when the process that started it is gone, killed perhaps, and wants no more results."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def compile_unit(unit: CaseOnTarget, compiling: Callable[[Launch], bool] = lambda launch: True) -> list[CompiledLaunch]:
    """Run a case's forward and backward on tensors without memory; what fails is a row with an ``error``.

    compiling: see ``offline``; the row of a launch that is not compiled has settings and no resources.
    """
    launches, forward_launches, error = compiled_launches(unit, compiling=compiling)
    directions = [
        "forward" if forward_launches is None or i < forward_launches else "backward" for i in range(len(launches))
    ]
    rows = [_row(unit, direction, launch) for direction, launch in zip(directions, launches, strict=True)]
    if error is not None:
        direction = "forward" if not forward_launches else "backward"
        named = (unit.op, unit.case.name, unit.dtype, unit.target)
        rows.append(CompiledLaunch(*named, direction, "", 0, {}, None, None, None, error))
    return rows


def compiled_launches(
    unit: CaseOnTarget,
    gpu: Chip | None = None,
    wanted: Callable[[str], bool] = lambda kernel: True,
    compiling: Callable[[Launch], bool] = lambda launch: True,
) -> tuple[list[Launch], int | None, str | None]:
    """Compile the launches of a case's forward and backward, in that order.

    Args:
        gpu: what to choose settings and compile for, in place of the unit's target.
        wanted, compiling: see ``offline``.

    Returns:
        The launches; how many of them are the forward's, None where it failed; the op's own error, if there was one.
        Errors of single launches stand with them.
    """
    case, error, forward_launches = unit.case, None, None
    target, choose = (unit.target, contextlib.nullcontext()) if gpu is None else (target_of(gpu), assume_chip(gpu))
    with offline(target, keep_going=True, wanted=wanted, compiling=compiling) as launches, choose:
        try:
            inputs = {}
            for name, shape in case.shapes.items():
                dtype = getattr(torch, case.dtypes[name]) if name in case.dtypes else DTYPES[unit.dtype]
                inputs[name] = allocate(shape, case.layouts.get(name), dtype, "meta")
                inputs[name].requires_grad_(name in OPS[unit.op].differentiable(case))
            outputs = getattr(functional, unit.op)(**arguments(inputs), **case.options)
            forward_launches = len(launches)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            leaves = [t for t in inputs.values() if t.requires_grad]
            if leaves:
                torch.autograd.grad(outputs, leaves, [torch.empty_like(y) for y in outputs])
        except Exception as failure:  # of the op itself: those of single launches are recorded with them
            error = f"{type(failure).__name__}: {failure}".splitlines()[0]
    if (not forward_launches or (case.gradients and forward_launches == len(launches))) and error is None:
        error = "no kernel was launched"  # plain PyTorch took over: nothing is proved
    return launches, forward_launches, error


def _row(unit: CaseOnTarget, direction: str, launch: Launch) -> CompiledLaunch:
    metadata = getattr(launch.compiled, "metadata", None)
    constexprs = {k: v if isinstance(v, int | float | str | None) else str(v) for k, v in launch.constexprs.items()}
    resources = None if launch.compiled is None else launch.resources()
    epilogue = None
    if resources is not None:
        epilogue = epilogue_per_element(resources.hot_loop, constexprs, launch.compiled.metadata.num_warps)
    return CompiledLaunch(
        unit.op, unit.case.name, unit.dtype, unit.target, direction, launch.kernel, launch.programs, constexprs,
        getattr(metadata, "num_warps", launch.options.get("num_warps")),
        getattr(metadata, "num_stages", launch.options.get("num_stages")),
        resources, launch.error,
        resources.serialized if resources is not None and launch.target.has_wgmma else None, epilogue, launch.code,
    )  # fmt: skip
