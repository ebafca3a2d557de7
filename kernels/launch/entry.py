"""How a kernel that is launched is declared."""

import functools

import triton
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from .recording import launch

ENTRIES: list["Entry"] = []  # all kernels that are launched


class Entry(JITFunction):
    """A kernel whose every launch says that a product and a sum may become one instruction.

    Triton up to 3.9 does so by default, and 3.9 warns that 3.10 will not. Saying it avoids the warning and keeps the
    numbers the same.
    """

    def __init__(self, fn, **options):
        super().__init__(fn, **options)
        ENTRIES.append(self)

    def __getitem__(self, grid):
        return lambda *args, **kwargs: launch(self, grid, args, kwargs)

    def start(self, grid, args, kwargs):
        """Launch as Triton does, which looks at every argument; returns what it compiled."""
        return self.run(*args, grid=grid, warmup=False, enable_fp_fusion=True, **kwargs)


class InterpretedEntry(InterpretedFunction):
    """The same where Triton's interpreter runs the kernels."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: launch(self, grid, args, kwargs)

    def start(self, grid, args, kwargs):
        self.run(*args, grid=grid, warmup=False, **kwargs)


def entry(fn=None, /, **options):
    """``@triton.jit`` for a kernel that is launched; functions that kernels call take ``@triton.jit`` itself."""
    if fn is None:
        return functools.partial(entry, **options)
    return (InterpretedEntry if triton.knobs.runtime.interpret else Entry)(fn, **options)
