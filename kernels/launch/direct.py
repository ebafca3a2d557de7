"""A launch of a kernel that is compiled, past everything that Triton does again at each launch.

Triton binds the arguments, looks at each for what the kernel was specialised to, looks the kernel up, and makes a new
object of every tensor descriptor. For arguments of a kind that was launched before, only the pointers are new.
"""

import inspect
from typing import Any, NamedTuple

import triton
from triton import knobs

try:
    from triton.backends.nvidia import driver as nvidia
except ImportError:  # a build of Triton without that backend
    nvidia = None

_MAPS = 256  # addresses that a descriptor is remembered for: layers of one kind share it, each with its own tensors


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


class Descriptor:
    """A tensor descriptor as the compiled kernel takes it: ``map(pointer)``, then ``sizes``, which do not change."""

    def __init__(self, described, compiled, index: int):
        """described: a TensorDescriptor; index: which of the kernel's descriptors it is."""
        expand = nvidia.make_tensordesc_arg
        more = (None,) * (len(inspect.signature(expand).parameters) - 2)  # Triton 3.8 added one, which it does not use
        self.form = compiled.metadata.tensordesc_meta[index], *more
        self.expand, self.described_at = expand, _described_at(described)
        self.maps: dict[int, Any] = {}
        _, *self.sizes = expand(self.described_at(described.base.data_ptr()), *self.form)

    def map(self, pointer: int):
        found = self.expand(self.described_at(pointer), *self.form)[0]
        if len(self.maps) >= _MAPS:
            self.maps.clear()
        self.maps[pointer] = found
        return found


def _described_at(described) -> type:
    """A class whose objects Triton takes for descriptors like ``described``, each at another address.

    Triton reads a descriptor's fields and asks its base for the address. The fields are the class's, since they are the
    same for all; an object holds its address alone, and is its own base.
    """

    class At:
        def __init__(self, pointer: int):
            self.pointer = pointer

        @property
        def base(self):
            return self

        def data_ptr(self) -> int:
            return self.pointer

    for name, value in vars(described).items():
        if name != "base":
            setattr(At, name, value)
    return At


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
