"""Triton's NumPy interpreter, mended where it silently differs from compiled kernels.

The interpreter keeps bfloat16 values as uint16 bits and computes on those bits: sums, products, compares and
``tl.dot`` of bfloat16 are meaningless numbers, and casts to bfloat16 truncate. It also never fires
``tl.device_assert``, multiplies in full float32 where tensor cores read TF32, lets NaN through ``tl.maximum`` and sums
16-bit floats more exactly than a GPU does. It dereferences whatever address a kernel computes, so that a dropped mask
reads a neighbour's memory and passes. ``mend()`` replaces the methods at fault. Known to work with Triton 3.6 to 3.9.
"""

__all__ = ["mend"]

import dataclasses
import functools
import threading
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter as runtime
from triton.runtime.interpreter import TensorHandle

from primer_fast.interpreter import arithmetic, speed  # noqa: F401, arithmetic: it registers what it replaces
from primer_fast.interpreter.bfloat16 import narrow
from primer_fast.interpreter.memory import descriptor_reduce
from primer_fast.interpreter.registry import BUILDER, replacements, replaces


def mend() -> None:
    """Make the interpreter of this process compute what compiled kernels compute; a second call changes nothing.

    Raises:
        RuntimeError: this version of Triton lacks what is replaced here, or still gets bfloat16 wrong afterwards.
    """
    builder: Any = getattr(runtime, BUILDER, None)
    if getattr(builder, "mended_by_primer_fast", False):
        return
    try:  # tl.device_assert, and the overflow checks of int32 arithmetic that stand on it, are off by default
        options = dataclasses.replace(runtime.interpreter_builder.options, debug=True)
    except (AttributeError, TypeError) as error:
        raise _unknown("has no option `debug`") from error
    originals: dict[tuple[str, str], Any] = {
        key: getattr(getattr(runtime, key[0], None), key[1], None) for key in replacements
    }
    missing = [".".join(key) for key, method in originals.items() if method is None]
    missing += [name for name in speed.REPLACED if not hasattr(runtime, name)]
    if missing:
        raise _unknown(f"has no {', '.join(missing)}")
    for (owner, method), original in originals.items():
        replacement = replacements[owner, method](original)
        setattr(getattr(runtime, owner), method, functools.wraps(original)(replacement))
    runtime.interpreter_builder.options = options
    runtime._patch_lang_tensor = _counted(runtime._patch_lang_tensor)
    # What is missing altogether: bfloat16 constants, and descriptor.atomic_add.
    builder.get_bf16 = lambda self, value: narrow(np.array([value], np.float32))
    builder.create_descriptor_reduce = descriptor_reduce
    _check(runtime.interpreter_builder)
    speed.quicken()
    builder.mended_by_primer_fast = True


_running = threading.RLock()


@replaces("GridExecutor", "__call__")
def _one_at_a_time(original):
    """While a kernel runs, what ``tl`` means is another for the whole process; kernels come from several threads."""

    def call(self, *args, **kwargs):
        with _running, np.errstate(all="ignore"):  # infinities and NaN are values like others
            speed.start_launch()
            return original(self, *args, **kwargs)

    return call


def _unknown(what: str) -> RuntimeError:
    return RuntimeError(
        f"the interpreter of Triton {triton.__version__} {what}: primer_fast.interpreter does not know it; "
        "use Triton 3.6 to 3.9"
    )


def _check(builder) -> None:
    """One cast, sum, product, compare and dot through the entry points that kernels reach."""

    def float32(*values):
        return TensorHandle(np.array([values], np.float32), tl.float32)

    def bfloat16(*values):
        return narrow(np.array([values]))

    got_and_want = {
        "cast": (builder.create_fp_trunc(float32(1 / 3), tl.bfloat16), 0x3EAB),
        "tie": (builder.create_fp_trunc(float32(1 + 3 * 2**-8), tl.bfloat16), 0x3F82),
        "+": (builder.create_fadd(bfloat16(1), bfloat16(2)), 0x4040),
        "*": (builder.create_fmul(bfloat16(-1.5), bfloat16(3)), 0xC090),
        "<": (builder.create_fcmpOLT(bfloat16(-1), bfloat16(0)), True),
        "dot": (builder.create_dot(bfloat16(2), bfloat16(3), float32(0.5), ir.INPUT_PRECISION.IEEE, 0), 6.5),
    }
    wrong = [name for name, (got, want) in got_and_want.items() if got.data.item() != want]
    if wrong:
        raise _unknown(f"computes {', '.join(wrong)} in ways not known here")


def _counted(original):
    """Triton 3.6 takes the bounds of a loop from arrays of one element in a way that NumPy 2.5 refuses."""

    def patch(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patch
