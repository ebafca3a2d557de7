"""What a launcher does, written down as it does it: memory taken, torch's operators, kernels launched.

A launcher is a function of tensors and options that decides by shapes, strides, dtypes and options alone, never by what
tensors hold. So what it did once it does again for all tensors alike, and plan.py makes a function of the steps.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_ALLOCATIONS = {
    _aten.empty.memory_format, _aten.empty_like.default, _aten.empty_strided.default,
    _aten.new_empty.default, _aten.new_empty_strided.default,
}  # fmt: skip
_here = threading.local()


@dataclass(eq=False)
class Memory:
    """Memory that steps read and write: an argument's, or what a step returned. ``tensor`` is that of the recording."""

    tensor: Tensor
    name: str


@dataclass
class Allocation:
    """Memory without content: ``memory`` is all of it."""

    memory: Memory


@dataclass
class Operator:
    """A call of torch's operator; results that are None were none, or were an argument that the call wrote to."""

    function: Callable
    args: tuple
    kwargs: dict
    results: list[Memory | None]
    single: bool  # it returned a tensor, not several


@dataclass
class Launch:
    """``kernel[grid](*args, **kwargs)``, and what Triton compiled for it; None where nothing was compiled."""

    kernel: Any
    grid: tuple
    args: tuple
    kwargs: dict
    compiled: Any


class NotRepeatable(Exception):
    """What was recorded depends on more than kinds of arguments."""


class Recording(TorchDispatchMode):
    """``with Recording(arguments) as recording: f(*recording.arguments)`` fills ``recording.steps``.

    arguments: tensors or None. ``recording.arguments`` are others of the same memory, each an object of its own: two
    arguments of a call may be one tensor, and in the next call two.
    """

    def __init__(self, arguments):
        super().__init__()
        self.steps: list[Allocation | Operator | Launch] = []
        self.known: dict[int, Memory] = {}  # by the id of a tensor
        self.alive: list[Tensor] = []  # so that no other tensor gets such an id
        self.arguments = [None if t is None else t.detach() for t in arguments]
        for i, t in enumerate(self.arguments):
            if t is not None:
                self._new(t, f"a{i}")
        self.listening = True  # to torch's operators
        self.repeatable = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch.compile never sees a recording; True would import all of torch._dynamo, which takes a second or two."""
        return False

    def memory_of(self, t: Tensor) -> Memory:
        """The memory that ``t`` is, or is a view of."""
        try:
            return self.known[id(t)]
        except KeyError:
            raise NotRepeatable("a tensor that is neither an argument nor made on the way") from None

    def _new(self, t: Tensor, name: str) -> Memory:
        return self._note(t, Memory(t, name))

    def _note(self, t: Tensor, memory: Memory) -> Memory:
        self.alive.append(t)
        self.known[id(t)] = memory
        return memory

    def _result(self, t) -> Memory | None:
        if not isinstance(t, Tensor) or id(t) in self.known:
            return None
        return self._new(t, f"t{len(self.known)}")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self.listening:
            return out
        if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
            self.repeatable = False
        results = out if isinstance(out, tuple | list) else (out,)
        if func.is_view and id(args[0]) in self.known:
            for view in results:
                if id(view) not in self.known:
                    self._note(view, self.known[id(args[0])])
        elif func in _ALLOCATIONS:
            self.steps.append(Allocation(self._new(out, f"t{len(self.known)}")))
        else:
            single = not isinstance(out, tuple | list)
            self.steps.append(Operator(func, args, kwargs, [self._result(t) for t in results], single))
        return out

    def __enter__(self):
        _here.recording = self
        return super().__enter__()

    def __exit__(self, *error):
        _here.recording = None
        return super().__exit__(*error)


def launch(kernel, grid, args, kwargs):
    """``kernel.start(...)``, noted where this thread records."""
    recording = getattr(_here, "recording", None)
    if recording is None:
        return kernel.start(grid, args, kwargs)
    recording.listening = False  # the interpreter runs a kernel with torch's operators
    try:
        compiled = kernel.start(grid, args, kwargs)
    finally:
        recording.listening = True
    recording.steps.append(Launch(kernel, grid, args, kwargs, compiled))
    return compiled
