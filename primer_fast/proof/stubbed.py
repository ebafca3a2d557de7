"""Launchers, autograd and Triton as on a GPU that is not there: all that a call costs the host, up to the driver.

Inside ``stubbed()`` tensors of the CPU count as a GPU's. Kernels are compiled for it, and each launch goes through
Triton to the point where its C code would call CUDA. There it ends; results hold whatever their memory held.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import triton
from triton.backends.nvidia import driver as nvidia

from primer_fast import backend
from primer_fast.kernels.device import forget_chip
from primer_fast.kernels.launch.entry import ENTRIES
from primer_fast.proof.offline import refuse_interpreter
from primer_fast.proof.targets import TARGETS, StandInDriver, Target


class _Driver(StandInDriver):
    """Takes compiled kernels, and hands what is launched to ``launched``."""

    launcher_cls = nvidia.CudaLauncher

    def __init__(self, target: Target, launched: Callable):
        super().__init__(target)
        self.launch = launched
        self.loaded = 0

    def load_binary(self, name, kernel, shared, device):
        self.loaded += 1
        return name, self.loaded, 0, 0, 1024  # module, function, registers, spills, threads

    def build_signature_metadata(self, signature) -> bytes:
        return repr(signature).encode()

    def fill_tma_descriptor_tiled(self, pointer: int, *form):
        return "descriptor", pointer, repr(form)

    fill_tma_descriptor = fill_tma_descriptor_tiled

    def unload_module(self, module) -> None:
        """Triton 3.8 and later call this when a compiled kernel is deleted; nothing was loaded here."""


@contextlib.contextmanager
def stubbed(
    target: str = "sm_90", launched: Callable = lambda *arguments: None, *, tensors: str = "cpu"
) -> Iterator[None]:
    """See above. launched: called with what Triton passes to its C code; tensors: the device of those that count.

    Everything is as before at exit.

    Raises:
        RuntimeError: TRITON_INTERPRET=1 was set when Triton was imported: its kernels cannot be compiled.
    """
    refuse_interpreter()
    before, device = triton.runtime.driver._active, backend.stand_in
    caches = {kernel: kernel.device_caches for kernel in ENTRIES}
    for kernel in ENTRIES:
        kernel.device_caches = type(kernel.device_caches)(kernel.create_binder)
    with contextlib.ExitStack() as stack:
        for name, value in _C_PARTS.items():  # what Triton has from C code once a GPU is there
            stack.callback(_set, nvidia, name, getattr(nvidia, name, None))
            _set(nvidia, name, value)
        if hasattr(nvidia, "make_launcher"):  # Triton 3.6 compiles a function for each signature
            for name, value in (
                ("make_launcher", lambda *a: ""),
                ("library_dirs", lambda: []),
                ("compile_module_from_src", lambda **a: SimpleNamespace(launch=launched)),
            ):
                stack.callback(_set, nvidia, name, getattr(nvidia, name))
                _set(nvidia, name, value)
        try:
            triton.runtime.driver.set_active(_Driver(TARGETS[target], launched))
            backend.stand_in = tensors
            forget_chip()
            yield
        finally:
            for kernel, cache in caches.items():
                kernel.device_caches = cache
            forget_chip()
            gc.collect()  # deletes compiled kernels, which ask their driver to unload them
            triton.runtime.driver.set_active(before)
            backend.stand_in = device
            forget_chip()


def _set(module: Any, name: str, value: Any) -> None:
    setattr(module, name, value)


_C_PARTS = {
    "PyKernelArg": lambda nested_tuple, type: (nested_tuple, type),
    "ARG_CONSTEXPR": 0, "ARG_KERNEL": 1, "ARG_TUPLE": 2,
}  # fmt: skip
