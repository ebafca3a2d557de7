"""Ahead-of-time compilation of exactly what the launchers launch, for GPUs that are not there.

Inside ``offline(target)`` an op is called on tensors without memory (``device="meta"``) as anywhere else. Its launchers
choose their settings for the target, and each ``kernel[grid](...)`` is compiled with the specialisation that the
arguments get on a GPU (alignment, sizes that 16 divides or that are 1), then recorded in place of running.
"""

import contextlib
import functools
import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import triton
from triton.runtime.jit import JITCallable, JITFunction

from primer_fast import backend
from primer_fast.kernels.device import forget_chip
from primer_fast.kernels.launch.prepared import unprepared
from primer_fast.proof.resources import Resources, read_resources
from primer_fast.proof.targets import TARGETS, StandInDriver, Target


class SharedMemoryExceeded(RuntimeError):
    """A kernel asks for more shared memory than a program may have: its launch would fail."""


@dataclass
class Launch:
    """One ``kernel[grid](...)``."""

    kernel: str
    grid: tuple[int, ...]
    constexprs: dict[str, Any]  # argument -> value
    options: dict[str, Any]  # num_warps, num_stages, ... as given at the launch
    target: Target
    code: str  # a digest of all that decides the machine code, but for the version of Triton
    compiled: Any = None  # triton.compiler.CompiledKernel; None where ``error`` says why, or where it was not asked for
    error: str | None = None

    @property
    def programs(self) -> int:
        count = 1
        for size in self.grid:
            count *= size
        return count

    def resources(self) -> Resources:
        """Registers, shared memory, instructions and warnings; takes half a second the first time."""
        return read_resources(self.compiled, self.target)


@contextlib.contextmanager
def offline(
    target: str | Target,
    *,
    keep_going: bool = False,
    wanted: Callable[[str], bool] = lambda kernel: True,
    compiling: Callable[[Launch], bool] = lambda launch: True,
) -> Iterator[list[Launch]]:
    """Compile instead of launch, for a target or the name of one of ``TARGETS``; yields the list that launches go to.

    Everything is as before at exit, after an error too. Not for several threads at once.

    Args:
        keep_going: a launch that cannot be is recorded with its ``error``, and the launcher goes on.
        wanted: asked at each launch with its kernel's name; where it says no, that launch is left out.
        compiling: asked at each other launch: where it says no, that launch is recorded and not compiled.

    Raises:
        ValueError: the target is unknown.
        RuntimeError: TRITON_INTERPRET=1 was set when Triton was imported: its kernels cannot be compiled.
        SharedMemoryExceeded: at a launch, unless ``keep_going``; errors of the compiler likewise.
    """
    if isinstance(target, str) and target not in TARGETS:
        raise ValueError(f"offline: target must be one of {', '.join(TARGETS)}; got {target!r}")
    refuse_interpreter()
    chip = TARGETS[target] if isinstance(target, str) else target
    launches: list[Launch] = []
    caches = {}  # kernel -> what it had compiled for the GPU of this machine
    run = JITFunction.run

    def record(self, *args, grid, warmup, **kwargs):
        if not wanted(self.__name__):
            return None
        if self not in caches:
            caches[self], self.device_caches = self.device_caches, type(self.device_caches)(self.create_binder)
        launch = _describe(self, args, kwargs, grid, chip)
        launches.append(launch)
        if not compiling(launch):
            return None
        output: list[str] = []
        try:
            with _captured(output):
                launch.compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
            _check_shared_memory(launch)
        except Exception as error:
            launch.error = _last_line(error, output)
            if not keep_going:
                raise
        return launch.compiled

    drivers = triton.runtime.driver
    driver = drivers._active  # not .active, which looks for a GPU
    try:
        JITFunction.run = record
        drivers.set_active(StandInDriver(chip))
        backend.stand_in = "meta"
        forget_chip()
        with unprepared():
            yield launches
    finally:
        JITFunction.run = run
        drivers.set_active(driver)
        backend.stand_in = None
        forget_chip()
        for kernel, cache in caches.items():
            kernel.device_caches = cache


def refuse_interpreter() -> None:
    """Raise RuntimeError where kernels are interpreted: Triton cannot compile any in such a process."""
    if backend.interpreting:
        raise RuntimeError("offline: TRITON_INTERPRET=1 was set when Triton was imported; unset it to compile kernels")


def _describe(kernel, args, kwargs, grid, target: Target) -> Launch:
    parameters = {p.name: p for p in kernel.params}
    options = {name: value for name, value in kwargs.items() if name not in parameters}
    bound = kernel.signature.bind(*args, **{name: value for name, value in kwargs.items() if name in parameters})
    bound.apply_defaults()
    constexprs = {name: value for name, value in bound.arguments.items() if parameters[name].is_constexpr}
    grid = tuple(grid(bound.arguments) if callable(grid) else grid)
    binder = kernel.device_caches[triton.runtime.driver.active.get_current_device()][-1]
    _, specialization, asked = binder(*args, **kwargs)
    decides = target.name, _source(kernel), specialization, sorted(asked.items())
    code = hashlib.sha256(repr(decides).encode()).hexdigest()[:16]
    return Launch(kernel.__name__, grid, constexprs, options, target, code)


@functools.cache
def _source(kernel: JITFunction) -> str:
    """The text of a kernel and of all functions and constants that it uses, in order of their names.

    Triton's own key of a kernel is another where kernels are first used in another order.
    """
    found: dict[str, str] = {}
    waiting = [kernel]
    while waiting:
        function = waiting.pop()
        module = function.fn.__module__
        if f"{module}.{function.__name__}" in found:
            continue
        found[f"{module}.{function.__name__}"] = function.src
        for name in set(re.findall(r"\w+", function.src)) & function.fn.__globals__.keys():
            value = function.fn.__globals__[name]
            if isinstance(value, JITCallable):
                waiting.append(value)
            elif isinstance(value, triton.language.constexpr):
                found[f"{module}.{name}"] = repr(value)
    return "\n".join(f"{name}: {text}" for name, text in sorted(found.items()))


def _check_shared_memory(launch: Launch) -> None:
    asked, limit = launch.compiled.metadata.shared, launch.target.shared_per_program
    if asked > limit:
        raise SharedMemoryExceeded(
            f"{launch.kernel} asks for {asked} bytes of shared memory; {launch.target.gpu} has {limit} for a program"
        )


def _last_line(error: Exception, output: list[str]) -> str:
    """The error in one line. A failed pass says only that it failed and prints the reason, then the whole program."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reasons = [line.partition("error: ")[2] for line in output if "error: " in line]
    return f"{type(error).__name__}: {': '.join(lines[-1:] + reasons[:1])}"


@contextlib.contextmanager
def _captured(output: list[str]) -> Iterator[None]:
    """Keep what C++ writes to stdout and stderr off the terminal and add its lines to ``output``."""
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        saved = [os.dup(1), os.dup(2)]
        try:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            yield
        finally:
            sys.stdout.flush()  # what Python printed goes the same way
            for number, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, number)
                os.close(copy)
            file.seek(0)
            output.extend(file.read().splitlines())
