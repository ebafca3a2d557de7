"""The GPU that kernels run on: what settings depend on, and which device is the current one."""

import contextlib
import functools
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .launch.prepared import forget


class Chip(NamedTuple):
    """A GPU, as far as settings depend on it. Rates are data sheets' for 16-bit products; only ratios matter."""

    arch: str  # sm_90, gfx942, ...
    name: str  # that its file in tuned/ has
    processors: int  # multiprocessors or compute units
    shared: int  # bytes of shared memory that one program may use
    tflops: float
    bandwidth: float  # of device memory, TB/s

    @property
    def has_descriptors(self) -> bool:
        """Whether it has a tensor memory accelerator, as Hopper and later do."""
        return self.arch.startswith("sm_") and int(self.arch[3:]) >= 90

    @property
    def is_amd(self) -> bool:
        return self.arch.startswith("gfx")


_RATES = {"sm_80": (312, 2.0), "sm_89": (165, 1.0), "sm_90": (989, 3.35), "sm_100": (2250, 8.0), "sm_120": (209, 1.8),
          "gfx942": (1307, 5.3), "gfx950": (2300, 8.0)}  # fmt: skip
CHIPS = {  # stand-ins where no driver says: the interpreter and tests
    "sm_80": Chip("sm_80", "a100", 108, 166912, *_RATES["sm_80"]),
    "sm_90": Chip("sm_90", "h100", 132, 232448, *_RATES["sm_90"]),
}
_assumed: Chip | None = None


@contextlib.contextmanager
def assume_chip(arch: str | Chip):
    """Inside, kernels and settings are chosen for this chip, or for the one of ``CHIPS`` with this name.

    "sm_80" loads by pointers, "sm_90" by descriptors.
    """
    global _assumed
    before, _assumed = _assumed, CHIPS[arch] if isinstance(arch, str) else arch
    forget()
    try:
        yield
    finally:
        _assumed = before
        forget()


def file_name(device: str) -> str:
    """The name of a GPU's files, made of the name that its driver gives it."""
    return "_".join(device.lower().split())


@functools.cache
def _active_chip(device: int) -> Chip:
    driver = triton.runtime.driver.active
    current = driver.get_current_device()
    driver.set_current_device(device)  # drivers tell the target of the current device alone
    try:
        target = driver.get_current_target()
    finally:
        driver.set_current_device(current)
    arch = f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)
    properties = driver.utils.get_device_properties(device)
    known = arch if arch in _RATES else "gfx942" if target.backend == "hip" else "sm_80"
    name = properties.get("name") or torch.cuda.get_device_name(device)  # only stand-in drivers give a name
    return Chip(
        arch,
        file_name(name),
        properties["multiprocessor_count"],
        properties["max_shared_mem"],
        *_RATES[known],
    )


def forget_chip() -> None:
    """Forget the GPU, as its driver was replaced."""
    _active_chip.cache_clear()
    forget()


def chip(device: int | None = None) -> Chip:
    """The GPU of this number; without a number, the one on which the next kernel is launched."""
    if _assumed is not None:
        return _assumed
    if triton.knobs.runtime.interpret:
        return CHIPS["sm_90"]
    return _active_chip(triton.runtime.driver.active.get_current_device() if device is None else device)


def chip_of(x: Tensor) -> Chip:
    """The GPU that holds ``x``: settings must suit it even where the host has GPUs of another kind."""
    return chip(x.get_device() if x.is_cuda else None)


_stay = contextlib.nullcontext()


def on_device_of(x: Tensor) -> AbstractContextManager:
    """Context in which kernels run on the GPU that holds ``x``; costs nothing where that is the current one."""
    return _stay if not x.is_cuda or x.get_device() == torch.cuda.current_device() else torch.cuda.device_of(x)


def dot_precision(gpu: Chip, precision: str) -> str:
    """torch.get_float32_matmul_precision() -> input_precision of tl.dot. AMD does not split float32."""
    if gpu.is_amd:
        return "ieee"
    return "tf32x3" if precision == "highest" else "tf32"


def passes(dot: str, itemsize: int) -> int:
    """How many tensor-core products make one product: three for float32 split into TF32 parts, otherwise one."""
    return 3 if dot == "tf32x3" and itemsize == 4 else 1


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
