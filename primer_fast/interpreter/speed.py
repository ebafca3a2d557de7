"""What Triton's interpreter works out anew for every value and every call, worked out once: about 5 times as fast.

A call of a device function looks through all of ``tl`` for builtins to replace, although the launch has already
replaced them. A sum of int32 is checked for overflow by ten more interpreted operations. A value's shape becomes a new
tuple of constants, and its type a new name, each time. The number in ``x * 2`` becomes a block of x's shape and type by
a dozen calls. `quicken` changes how these are found, not what they are.
"""

__all__ = ["REPLACED", "quicken", "start_launch"]

import functools
import inspect
import math
from collections.abc import Callable

import numpy as np
import triton.language as tl
from triton.language import core
from triton.runtime import interpreter as runtime
from triton.runtime.interpreter import TensorHandle

# members of the interpreter's module
REPLACED = ("_patch_lang", "_patch_builtin", "_get_np_dtype", "interpreter_semantic")


def quicken() -> None:
    """Let the interpreter of this process remember. Call it once, where the module has all of ``REPLACED``."""
    runtime._patch_lang = _once_a_launch(runtime._patch_lang)
    runtime._patch_builtin = _replace_builtins
    runtime._get_np_dtype = _by_scalar(runtime._get_np_dtype)
    semantic = runtime.interpreter_semantic
    semantic.binary_op_sanitize_overflow_impl = _check_overflow
    semantic.broadcast_impl_value = _common_shape(semantic.broadcast_impl_value)
    semantic.binary_op_type_checking_impl = _pairs_seen_before(
        semantic.binary_op_type_checking_impl, semantic.broadcast_impl_value
    )
    core._unwrap_if_constexpr = _plain_as_they_are(core._unwrap_if_constexpr)
    core.dtype.__eq__ = _itself_first(core.dtype.__eq__)
    core.block_type.with_element_ty = _known_type
    core.block_type.__init__ = _with_known_shape(core.block_type.__init__)
    core.tensor.__init__ = _init_tensor


_replaced: set[int] = set()  # ids of those of the modules ``tl`` and ``tl.core`` that are replaced now


def start_launch() -> None:
    """A launch ends with ``tl`` as it was before, so that the next must replace it again."""
    _replaced.clear()


class _NothingToRestore:
    def restore(self) -> None:
        """Nothing: the call that replaced it restores it."""


def _once_a_launch(original: Callable) -> Callable:
    of_namespace: dict[int, set[int]] = {}  # namespace of a module -> which of the two it names; ids of all

    @functools.wraps(original)
    def patch_lang(function):
        names = function.__globals__
        if id(names) not in of_namespace:
            of_namespace[id(names)] = {id(value) for value in names.values() if value is tl or value is core}
        wanted = of_namespace[id(names)]
        if wanted and wanted <= _replaced:
            return _NothingToRestore()
        _replaced.update(wanted)
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
        if self is other:
            return True
        return self.name == other.name if type(self) is type(other) is core.dtype else original(self, other)

    return equal


def _replace_builtins(package, builder, scope) -> None:
    """While a kernel runs, each builtin of ``tl`` is the function under the check that a compiler calls it."""
    for name, call in _interpreted(package):
        scope.set_attr(package, name, call)


@functools.cache
def _interpreted(package) -> list[tuple[str, Callable]]:
    """The builtins of a module or class, by name; first asked for before any of them is replaced."""
    return [(name, _call_of(member)) for name, member in inspect.getmembers(package) if core.is_builtin(member)]


def _call_of(builtin: Callable) -> Callable:
    function, semantic = getattr(builtin, "__wrapped__", builtin), runtime.interpreter_semantic

    def call(*args, **kwargs):
        kwargs["_semantic"] = semantic
        return function(*args, **kwargs)

    return call


_PLAIN = frozenset({core.tensor, int, float, bool, str, type(None)})


def _plain_as_they_are(original: Callable) -> Callable:
    @functools.wraps(original)
    def unwrap(value):
        return value if type(value) in _PLAIN else original(value)

    return unwrap


def _common_shape(original: Callable) -> Callable:
    """Two blocks of one shape need nothing; of two shapes, Triton finds the common one, once."""
    of_shapes: dict[tuple[int, int], core.block_type] = {}  # by identity: _constants keeps each shape

    @functools.wraps(original)
    def broadcast(lhs, rhs, whole=True):
        """Give both the common shape: their arrays too with ``whole``, else their types alone.

        Without it the operation that follows lets NumPy broadcast the arrays.
        """
        if lhs.shape is rhs.shape:
            return lhs, rhs
        key = id(lhs.shape), id(rhs.shape)
        if key not in of_shapes:
            of_shapes[key] = original(lhs, rhs)[0].type
        like = of_shapes[key]
        return tuple([
            value if value.type.is_block() and value.type.shape is like.shape
            else _spread(value, like.with_element_ty(value.type.scalar), whole)
            for value in (lhs, rhs)
        ])  # fmt: skip

    return broadcast


def _spread(value: core.tensor, block: core.block_type, whole: bool) -> core.tensor:
    handle = value.handle
    if whole:
        handle = TensorHandle(np.broadcast_to(handle.data, tuple(block.shape)), handle.dtype.scalar)
    return core.tensor(handle, block)


def _pairs_seen_before(original: Callable, broadcast: Callable) -> Callable:
    """What two operands become before an operation: alike in type and shape.

    Two tensors of one type need a common shape alone, but that a quotient may be of another type; so do a pointer and
    an offset. A number becomes what it became beside the last tensor of that type and shape.
    """
    of_number: dict[tuple, core.tensor] = {}

    @functools.wraps(original)
    def operands(lhs, rhs, *allowed, **options):
        if type(lhs) is type(rhs) is core.tensor:
            of_pointer = lhs.dtype.is_ptr()
            alike = (allowed[:1] == (True,) and rhs.dtype.is_int()) if of_pointer else lhs.dtype is rhs.dtype
            if alike and not options and len(allowed) < 3:
                return broadcast(lhs, rhs, whole=False)
            return original(lhs, rhs, *allowed, **options)
        number, beside, first = (lhs, rhs, True) if type(rhs) is core.tensor else (rhs, lhs, False)
        kind = type(number)
        if kind not in (int, float, bool):
            return original(lhs, rhs, *allowed, **options)
        key = number, kind, first, beside.dtype.name, id(beside.shape), allowed, *options.items()
        block = of_number.get(key)
        if block is None:
            pair = original(lhs, rhs, *allowed, **options)
            block, other = pair if first else pair[::-1]
            if other is not beside:
                return pair
            if len(of_number) == 10_000:
                of_number.clear()
            of_number[key] = block
            block.handle.data = block.handle.data.reshape(-1)[:1].copy()  # one number serves the whole block
        return (block, beside) if first else (beside, block)

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


_types: dict[tuple[int, str], core.block_type] = {}  # shape (by identity), name of the elements


def _known_type(self, element_ty) -> core.block_type:
    """The type of this shape with other elements; names of pointers do not tell their address space."""
    if element_ty.is_ptr():
        return core.block_type(element_ty, self.shape)
    key = id(self.shape), element_ty.name
    if key not in _types:
        _types[key] = core.block_type(element_ty, self.shape)
    return _types[key]


_constants: dict[int, tuple] = {}  # id of a type's shape -> the shape itself, its sizes as constants, their product


def _init_tensor(self, handle, type) -> None:
    """As Triton's: ``type`` may be passed by name."""
    shape = type.shape if type.is_block() else ()
    constants = _constants.get(id(shape))
    if constants is None:
        constants = shape, core.tuple([tl.constexpr(size) for size in shape]), tl.constexpr(math.prod(shape))
        _constants[id(shape)] = constants
    _, self.shape, self.numel = constants
    self.handle, self.type, self.dtype = handle, type, type.scalar
