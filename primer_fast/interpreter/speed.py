"""What Triton's interpreter works out anew for every value and every call, worked out once: about 3 times as fast.

A call of a device function looks through all of ``tl`` for builtins to replace, although the launch has already
replaced them. A sum of int32 is checked for overflow by ten more interpreted operations. A value's shape becomes a new
tuple of constants, and its type a new name, each time. `quicken` changes how these are found, not what they are.
"""

__all__ = ["REPLACED", "quicken", "start_launch"]

import functools
import math
from collections.abc import Callable

import numpy as np
import triton.language as tl
from triton.language import core
from triton.runtime import interpreter as runtime

REPLACED = ("_patch_lang", "_get_np_dtype", "interpreter_semantic")  # members of the interpreter's module


def quicken() -> None:
    """Let the interpreter of this process remember. Call it once, where the module has all of ``REPLACED``."""
    runtime._patch_lang = _once_a_launch(runtime._patch_lang)
    runtime._get_np_dtype = _by_scalar(runtime._get_np_dtype)
    semantic = runtime.interpreter_semantic
    semantic.binary_op_sanitize_overflow_impl = _check_overflow
    semantic.binary_op_type_checking_impl = _alike_as_they_are(semantic.binary_op_type_checking_impl)
    core.dtype.__eq__ = _itself_first(core.dtype.__eq__)
    core.block_type.__init__ = _with_known_shape(core.block_type.__init__)
    core.tensor.__init__ = _init_tensor


_replaced: set[int] = set()  # the modules whose view of ``tl`` is replaced, as ids of their namespaces


def start_launch() -> None:
    """A launch ends with ``tl`` as it was before, so that the next must replace it again."""
    _replaced.clear()


class _NothingToRestore:
    def restore(self) -> None:
        """Nothing: the call that replaced it restores it."""


def _once_a_launch(original: Callable) -> Callable:
    @functools.wraps(original)
    def patch_lang(function):
        module = id(function.__globals__)
        if module in _replaced:
            return _NothingToRestore()
        _replaced.add(module)
        return original(function)

    return patch_lang


def _by_scalar(original: Callable) -> Callable:
    """A block's NumPy type is that of its elements, which are of few types."""
    of_name: dict[str, np.dtype] = {}

    @functools.wraps(original)
    def numpy_dtype(dtype):
        scalar = dtype.scalar
        if isinstance(scalar, tl.pointer_type):
            return original(scalar)
        if scalar.name not in of_name:
            of_name[scalar.name] = original(scalar)
        return of_name[scalar.name]

    return numpy_dtype


def _itself_first(original: Callable) -> Callable:
    @functools.wraps(original)
    def equal(self, other):
        return self is other or original(self, other)

    return equal


def _alike_as_they_are(original: Callable) -> Callable:
    """Two numbers of one type and shape need no cast and no broadcast, but that a quotient may be of another type."""

    @functools.wraps(original)
    def operands(lhs, rhs, *allowed, **options):
        alike = type(lhs) is type(rhs) is core.tensor and lhs.dtype is rhs.dtype and lhs.shape is rhs.shape
        if alike and not (options or len(allowed) > 2 or lhs.dtype.is_ptr()):
            return lhs, rhs
        return original(lhs, rhs, *allowed, **options)

    return operands


_UFUNCS = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def _check_overflow(lhs, rhs, binary_op: Callable) -> None:
    """Raise AssertionError, as ``tl.device_assert`` does, where a result of fewer than 64 bits would wrap around."""
    scalar = lhs.type.scalar
    if scalar.int_bitwidth >= 64:
        return
    result = _UFUNCS[binary_op.__name__](lhs.handle.data, rhs.handle.data, dtype=np.int64)
    if result.min() < scalar.get_int_min_value() or result.max() > scalar.get_int_max_value():
        raise AssertionError(f"int{scalar.int_bitwidth} overflow detected for operation {binary_op.__name__}")


def _with_known_shape(original: Callable) -> Callable:
    """Types of one shape share its checked form and its number of elements."""
    of_shape: dict[tuple[int, ...], core.block_type] = {}

    @functools.wraps(original)
    def init(self, element_ty, shape):
        key = tuple([size.value if isinstance(size, tl.constexpr) else size for size in shape])
        like = of_shape.get(key)
        if like is None:
            original(self, element_ty, shape)
            of_shape[key] = self
        else:
            self.element_ty, self.shape, self.numel = element_ty, like.shape, like.numel
            self.name = f"<{key}, {element_ty}>"

    return init


_constants: dict[tuple[int, ...], tuple[tl.constexpr, core.tuple]] = {}  # shape -> its product, and itself


def _init_tensor(self, handle, type) -> None:
    """As Triton's: ``type`` may be passed by name."""
    key = tuple(type.shape) if type.is_block() else ()
    if key not in _constants:
        _constants[key] = tl.constexpr(math.prod(key)), core.tuple([tl.constexpr(size) for size in key])
    self.numel, self.shape = _constants[key]
    self.handle, self.type, self.dtype = handle, type, type.scalar
