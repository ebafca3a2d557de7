"""How a kernel that is launched is declared."""

import functools

import triton
from triton.runtime.jit import JITFunction


class Entry(JITFunction):
    """A kernel whose every launch says that a product and a sum may become one instruction.

    Triton up to 3.9 does so by default, and 3.9 warns that 3.10 will not. Saying it avoids the warning and keeps the
    numbers the same.
    """

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.run(*args, grid=grid, warmup=False, enable_fp_fusion=True, **kwargs)


def entry(fn=None, /, **options):
    """``@triton.jit`` for a kernel that is launched; functions that kernels call take ``@triton.jit`` itself."""
    if fn is None:
        return functools.partial(entry, **options)
    return triton.jit(fn, **options) if triton.knobs.runtime.interpret else Entry(fn, **options)
