"""A launch of a kernel that is compiled, past everything that Triton does again at each launch.

Triton binds the arguments, looks at each for what the kernel was specialised to, looks the kernel up, and makes a new
object of every tensor descriptor. For arguments of a kind that was launched before, only the pointers are new.
"""

from typing import Any, NamedTuple

import triton
from triton import knobs

try:
    from triton.backends.nvidia import driver as nvidia
except ImportError:  # a build of Triton without that backend
    nvidia = None

_MAPS = 64  # addresses for which a descriptor is remembered: of the weights of so many equal layers, for example


class Call(NamedTuple):
    """How to launch: ``function(gx, gy, gz, stream, *before, *arguments)``; with ``packed``, the arguments as one."""

    function: Any
    before: tuple
    packed: bool


def call_of(compiled) -> Call | None:
    """None where this version of Triton, or the kernel, needs more than a call."""
    launcher = getattr(compiled, "run", None)
    cuda = getattr(nvidia, "CudaLauncher", None)
    if cuda is None or not isinstance(launcher, cuda) or getattr(launcher, "gsan_enabled", False):
        return None
    if launcher.global_scratch_size or launcher.profile_scratch_size:
        return None
    wanted = compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl
    metadata, nothing = compiled.packed_metadata, (None,) * 3  # metadata for hooks, hook before, hook after
    if hasattr(launcher, "kernel_signature"):  # Triton 3.7 and later
        function = triton.runtime.driver.active.utils.launch
        form = launcher.arg_annotations, launcher.kernel_signature
        return Call(function, (*wanted, metadata, *nothing, None, None, *form), True)
    function = launcher.launch
    if getattr(function, "__name__", "") == "inner":  # around it, Triton expands descriptors
        names = function.__code__.co_freevars
        function = function.__closure__[names.index("launcher")].cell_contents
    return Call(function, (*wanted, None, None, metadata, *nothing), False)


class _At:
    """What a descriptor needs of its base: where it is."""

    def __init__(self, pointer: int):
        self.pointer = pointer

    def data_ptr(self) -> int:
        return self.pointer


class Descriptor:
    """A tensor descriptor as the compiled kernel takes it: ``map(pointer)``, then ``sizes``, which do not change."""

    def __init__(self, described, compiled, index: int):
        """described: a TensorDescriptor; index: which of the kernel's descriptors it is."""
        signature = [s for s in compiled.src.signature.values() if isinstance(s, str) and s.startswith("tensordesc")]
        self.signature, self.meta = {0: signature[index]}, [compiled.metadata.tensordesc_meta[index]]
        self.fields = {k: v for k, v in vars(described).items() if k != "base"}
        self.kind = type(described)
        self.maps: dict[int, Any] = {}
        self.sizes = self._expanded(described.base.data_ptr())[1:]

    def _expanded(self, pointer: int) -> list:
        described = object.__new__(self.kind)
        vars(described).update(self.fields, base=_At(pointer))
        if hasattr(nvidia, "_BASE_ARGS_FORMAT_LEN"):  # Triton 3.6: arguments one by one, after so many others
            first = nvidia._BASE_ARGS_FORMAT_LEN
            expand = nvidia.wrap_handle_tensordesc(lambda *all: all[first:], self.signature, self.meta)
            return list(expand(*(None,) * first, described))
        expand = nvidia.wrap_handle_tensordesc(lambda arguments: arguments, self.signature, self.meta)
        return list(expand([described]))

    def map(self, pointer: int):
        found = self._expanded(pointer)[0]
        if len(self.maps) >= _MAPS:
            self.maps.clear()
        self.maps[pointer] = found
        return found


def observed() -> bool:
    """Whether somebody looks on at launches: a profiler's hooks get what Triton gives them, and Triton launches."""
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    try:
        return bool(hooks[0].calls or hooks[1].calls)
    except AttributeError:  # one that was put in the chains' place
        return any(hook is not None for hook in hooks)


def stream_for(driver, device: int) -> int | None:
    """The stream to launch on; None where Triton must launch, or on another device than the current one."""
    active = triton.runtime.driver.active
    if active is not driver or observed() or active.get_current_device() != device:
        return None
    return active.get_current_stream(device)
