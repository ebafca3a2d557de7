"""Triton's NumPy interpreter, mended where it silently differs from compiled kernels.

The interpreter keeps bfloat16 values as uint16 bits and computes on those bits: sums, products, compares and
``tl.dot`` of bfloat16 are meaningless numbers, and casts to bfloat16 truncate. It also never fires
``tl.device_assert``, multiplies in full float32 where tensor cores read TF32, lets NaN through ``tl.maximum`` and sums
16-bit floats more exactly than a GPU does. It dereferences whatever address a kernel computes, so that a dropped mask
reads a neighbour's memory and passes. ``mend()`` _replaces the methods at fault. Known to work with Triton 3.6 to 3.9.
"""

__all__ = ["mend"]

import dataclasses
import functools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton._C.libtriton import interpreter as raw_memory
from triton._C.libtriton import ir
from triton.runtime import interpreter as runtime
from triton.runtime.interpreter import TensorHandle

from primer_fast import interpreter_speed

_BUILDER = "InterpreterBuilder"  # the class whose methods carry out what a kernel calls
_replacements: dict[tuple[str, str], Callable] = {}  # (class, method) -> function from the method to its replacement


def _replaces(owner: str, *methods: str):
    """The decorated function takes the method that was there and returns the one that takes its place."""

    def register(replace):
        _replacements.update({(owner, method): replace for method in methods})
        return replace

    return register


def mend() -> None:
    """Make the interpreter of this process compute what compiled kernels compute; a second call changes nothing.

    Raises:
        RuntimeError: this version of Triton lacks what is replaced here, or still gets bfloat16 wrong afterwards.
    """
    builder: Any = getattr(runtime, _BUILDER, None)
    if getattr(builder, "mended_by_primer_fast", False):
        return
    try:  # tl.device_assert, and the overflow checks of int32 arithmetic that stand on it, are off by default
        options = dataclasses.replace(runtime.interpreter_builder.options, debug=True)
    except (AttributeError, TypeError) as error:
        raise _unknown("has no option `debug`") from error
    originals: dict[tuple[str, str], Any] = {
        key: getattr(getattr(runtime, key[0], None), key[1], None) for key in _replacements
    }
    missing = [".".join(key) for key, method in originals.items() if method is None]
    if missing:
        raise _unknown(f"has no {', '.join(missing)}")
    for (owner, method), original in originals.items():
        replacement = _replacements[owner, method](original)
        setattr(getattr(runtime, owner), method, functools.wraps(original)(replacement))
    runtime.interpreter_builder.options = options
    runtime._patch_lang_tensor = _counted(runtime._patch_lang_tensor)
    # What is missing altogether: bfloat16 constants, and descriptor.atomic_add.
    builder.get_bf16 = lambda self, value: _narrow(np.array([value], np.float32))
    builder.create_descriptor_reduce = _descriptor_reduce
    _check(runtime.interpreter_builder)
    interpreter_speed.quicken()
    builder.mended_by_primer_fast = True


_running = threading.RLock()


@_replaces("GridExecutor", "__call__")
def _one_at_a_time(original):
    """While a kernel runs, what ``tl`` means is another for the whole process; kernels come from several threads."""

    def call(self, *args, **kwargs):
        with _running:
            interpreter_speed.start_launch()
            return original(self, *args, **kwargs)

    return call


def _unknown(what: str) -> RuntimeError:
    return RuntimeError(
        f"the interpreter of Triton {triton.__version__} {what}: primer_fast/interpreter.py cannot mend its bfloat16; "
        "use Triton 3.6 to 3.9"
    )


def _check(builder) -> None:
    """One cast, sum, product, compare and dot through the entry points that kernels reach."""

    def float32(*values):
        return TensorHandle(np.array([values], np.float32), tl.float32)

    def bfloat16(*values):
        return _narrow(np.array([values]))

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


# bfloat16 bits and the float32 values they stand for


def _widen_bits(bits: np.ndarray) -> np.ndarray:
    """uint16 bits of bfloat16 -> the same values as float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _narrow_values(values: np.ndarray) -> np.ndarray:
    """Numbers -> uint16 bits of the nearest bfloat16, ties to even; rounded once, from int32 and float64 too."""
    values = np.asarray(values)
    if values.dtype not in (np.float32, np.float16):
        values = _round_to_odd(values.astype(np.float64))
    bits = values.astype(np.float32).view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(values), quiet_nan, nearest).astype(np.uint16)


def _round_to_odd(values: np.ndarray) -> np.ndarray:
    """float64 -> float32, the last bit odd where inexact: the next rounding cannot take it for a tie."""
    with np.errstate(over="ignore"):
        nearest = values.astype(np.float32)
    cut = np.where(np.abs(nearest) > np.abs(values), np.nextafter(nearest, np.float32(0)), nearest)
    return (cut.view(np.uint32) | (cut != values)).view(np.float32)


def _counted(original):
    """Triton 3.6 takes the bounds of a loop from arrays of one element in a way that NumPy 2.5 refuses."""

    def patch(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patch


def _is_bfloat16(operand) -> bool:
    return isinstance(operand, TensorHandle) and operand.dtype.scalar == tl.bfloat16


def _widen(operand):
    """A bfloat16 handle -> float32; anything else as it is."""
    return TensorHandle(_widen_bits(operand.data), tl.float32) if _is_bfloat16(operand) else operand


def _narrow(values: np.ndarray) -> TensorHandle:
    return TensorHandle(_narrow_values(values), tl.bfloat16)


# What is replaced, and why


@_replaces(_BUILDER, "unary_op", "binary_op", "ternary_op", "create_erf", "create_rsqrt")
def _elementwise(original):
    """One operation in float32, rounded once, is the operation in bfloat16."""

    def elementwise(self, *operands):
        with np.errstate(all="ignore"):  # infinities and NaN are values like others
            if operands[-1] is np.where or not any(
                map(_is_bfloat16, operands)
            ):  # a choice moves bits, whatever they are
                return original(self, *operands)
            result = original(self, *map(_widen, operands))
        return result if result.data.dtype == np.bool_ else _narrow(result.data)

    return elementwise


@_replaces(_BUILDER, "create_fma")
def _fma(original):
    """A fused multiply-add rounds once: the two-sum keeps what float64 loses, an odd last bit carries it on."""

    def fma(self, x, y, z):
        if not _is_bfloat16(z):
            return original(self, x, y, z)
        x, y, z = (_widen_bits(operand.data).astype(np.float64) for operand in (x, y, z))
        with np.errstate(invalid="ignore"):
            product = x * y  # exact
            total = product + z
            rest = total - product
            error = (product - (total - rest)) + (z - rest)  # total + error == product + z
            error = np.where(np.isfinite(total), error, 0)
            cut = np.where(error * total < 0, np.nextafter(total, 0), total)
        return _narrow((cut.view(np.uint64) | (error != 0)).view(np.float64))

    return fma


@_replaces(_BUILDER, "cast_impl")
def _cast(original):
    """Casts to bfloat16 truncated."""

    def cast_impl(self, src, dst_type):
        if dst_type.scalar == tl.bfloat16:
            return src if _is_bfloat16(src) else _narrow(src.data)
        return original(self, _widen(src), dst_type)

    return cast_impl


@_replaces(_BUILDER, "create_dot")
def _dot(original):
    """Products of bfloat16 are exact in float32; those in TF32 see the upper 19 bits of each factor."""

    def create_dot(self, a, b, acc, input_precision, *rest):
        a, b = _widen(a), _widen(b)
        if input_precision == ir.INPUT_PRECISION.TF32 and a.dtype.scalar == tl.float32:
            a, b = (TensorHandle(_as_tf32(operand.data), tl.float32) for operand in (a, b))
        return original(self, a, b, acc, input_precision, *rest)

    return create_dot


def _as_tf32(values: np.ndarray) -> np.ndarray:
    return (values.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


@_replaces(_BUILDER, "create_maxnumf")
def _maximum(original):
    """tl.maximum drops NaN on a GPU unless told otherwise."""
    return lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)


@_replaces(_BUILDER, "create_minnumf")
def _minimum(original):
    """As tl.maximum."""
    return lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)


@_replaces(_BUILDER, "create_clampf")
def _clamp(original):
    """As tl.maximum."""

    def create_clampf(self, x, low, high, propagate_nan):
        if propagate_nan != ir.PROPAGATE_NAN.NONE:
            return original(self, x, low, high, propagate_nan)
        return self.binary_op(self.binary_op(x, low, np.fmax), high, np.fmin)

    return create_clampf


@_replaces("ReduceOps", "sum")
def _sum(original):
    """A compiled sum of 16-bit floats is a tree that rounds at every addition; NumPy's adds in float32."""

    def total(self, input):
        if input.dtype not in (tl.bfloat16, tl.float16):
            return original(self, input)
        data, axis = input.handle.data, self.axis
        kept = [1 if axis in (None, i) else size for i, size in enumerate(data.shape)]
        data = data.reshape(-1) if axis is None else np.moveaxis(data, axis, 0)
        while len(data) > 1:  # a power of two, as every axis of a block
            low, high = np.split(data, 2)
            if input.dtype == tl.bfloat16:
                data = _narrow_values(_widen_bits(low) + _widen_bits(high))
            else:
                data = low + high
        return self.to_tensor(data.reshape(kept) if self.keep_dims else data[0], input.dtype)

    return total


@_replaces("ReduceOps", "min_max")
def _min_max(original):
    """The order of the bits is not the order of the values."""

    def min_max(self, input, *reductions, **options):
        values = input[0] if isinstance(input, tuple) else input
        if values.dtype != tl.bfloat16:
            return original(self, input, *reductions, **options)
        result = original(self, self.to_tensor(_widen_bits(values.handle.data), tl.float32), *reductions, **options)
        parts = result if isinstance(result, tuple) else (result,)
        for part in parts:
            if part.dtype == tl.float32:  # the value; the index stays as it is
                part.handle = _narrow(part.handle.data)
                part.dtype = tl.bfloat16
                part.type = tl.block_type(tl.bfloat16, part.shape) if part.type.is_block() else tl.bfloat16
        return result

    return min_max


@_replaces("ScanOps", "cumsum", "cumprod")
def _scan(original):
    """NumPy would add and multiply the bits; the general scan goes through the operations above."""

    def scan(self, input):
        return original(self, input) if input.dtype != tl.bfloat16 else self.generic_scan((input,))

    return scan


# Memory: only the tensor arguments of a launch may be touched, and atomics know bfloat16

# (first byte, byte past the last, name) of each tensor argument of the launch under way
_extents: list[tuple[int, int, str]] = []


@_replaces("GridExecutor", "_init_args_hst")
def _remember_extents(original):
    """The arguments as the kernel sees them."""

    def init_args_host(self, args, kwargs):
        args, kwargs = original(self, args, kwargs)
        named = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        _extents[:] = [extent for name, arg in named.items() for extent in _extents_of(arg, name)]
        return args, kwargs

    return init_args_host


def _extents_of(arg, name: str) -> list[tuple[int, int, str]]:
    if isinstance(arg, tuple):
        return [extent for part in arg for extent in _extents_of(part, name)]
    if not isinstance(arg, torch.Tensor):  # a tensor descriptor or a reinterpreted tensor; else a number
        return _extents_of(arg.base, name) if hasattr(arg, "base") else []
    if arg.numel() == 0:
        return []
    last = sum((size - 1) * stride for size, stride in zip(arg.shape, arg.stride(), strict=True))
    return [(arg.data_ptr(), arg.data_ptr() + (last + 1) * arg.element_size(), name)]


def _check_addresses(access: str, pointers, mask) -> None:
    mask = np.asarray(mask.data, dtype=bool)  # of a handle, or of the array itself
    addresses = pointers.data if mask.all() else np.broadcast_to(pointers.data, mask.shape)[mask]
    if addresses.size == 0:
        return
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    first, last = int(addresses.min()), int(addresses.max())
    if any(start <= first and last + size <= end for start, end, _ in _extents):
        return  # the common case: one access lies in one tensor
    inside = np.zeros(addresses.shape, dtype=bool)
    for start, end, _ in _extents:
        inside |= (addresses >= np.uint64(start)) & (addresses <= np.uint64(end - size))
    if inside.all():
        return
    address = int(addresses[~inside].flat[0])
    beyond = [(max(start - address, address + size - end), name) for start, end, name in _extents]
    nearest = "; the launch has no tensor" if not beyond else ", the first by {} bytes from {}".format(*min(beyond))
    raise IndexError(f"{access}: {(~inside).sum()} of {inside.size} addresses lie outside the arguments{nearest}")


def _as_bool(mask):
    """A mask as Triton 3.9 wants it: ``&`` of a mask and a number that is 0 or 1 is an integer in its interpreter."""
    data = getattr(mask, "data", None)
    return TensorHandle(data != 0, tl.int1) if isinstance(data, np.ndarray) and data.dtype != np.bool_ else mask


@_replaces(_BUILDER, "create_masked_load")
def _load(original):
    """A GPU reads what is there, or faults; never what the author meant."""

    def create_masked_load(self, pointers, mask, *rest, **options):
        _check_addresses("load", pointers, mask)
        return original(self, pointers, _as_bool(mask), *rest, **options)

    return create_masked_load


@_replaces(_BUILDER, "create_masked_store")
def _store(original):
    """As a load, and it would corrupt this process."""

    def create_masked_store(self, pointers, value, mask, *rest, **options):
        _check_addresses("store", pointers, mask)
        return original(self, pointers, value, _as_bool(mask), *rest, **options)

    return create_masked_store


@_replaces(_BUILDER, "create_atomic_rmw")
def _atomic(original):
    """There was no addition for bfloat16; two lanes may share an address, so one lane after the other."""

    def create_atomic_rmw(self, op, pointers, value, mask, *rest):
        _check_addresses("atomic", pointers, mask)
        if not _is_bfloat16(value):
            return original(self, op, pointers, value, mask, *rest)
        if op != ir.ATOMIC_OP.FADD:
            raise NotImplementedError(f"interpreter: atomic {op} of bfloat16")
        addresses, values, mask = np.broadcast_arrays(pointers.data, _widen_bits(value.data), mask.data)
        before = np.zeros(addresses.shape, dtype=np.uint16)
        one, nothing = np.ones(1, dtype=bool), np.zeros(1, dtype=np.uint16)
        for lane in zip(*np.nonzero(mask), strict=True):
            address = addresses[lane].reshape(1)
            old = raw_memory.load(address, one, nothing, np.dtype(np.uint16))
            raw_memory.store(address, _narrow_values(_widen_bits(old) + values[lane]), one)
            before[lane] = old[0]
        return TensorHandle(before, tl.bfloat16)

    return create_atomic_rmw


def _descriptor_reduce(self, kind, descriptor, value, offsets):
    """``descriptor.atomic_add``, which the interpreter lacks and the compiler has."""
    if kind != ir.DESCRIPTOR_REDUCE_KIND.ADD:
        raise NotImplementedError(f"interpreter: descriptor reduction {kind}")
    pointers, mask = descriptor.materialize_pointers(offsets)
    op = ir.ATOMIC_OP.FADD if value.dtype.scalar.is_floating() else ir.ATOMIC_OP.ADD
    mask = mask if isinstance(mask, TensorHandle) else TensorHandle(mask, tl.int1)  # a handle since Triton 3.9
    self.create_atomic_rmw(op, pointers, value, mask, ir.MEM_SEMANTIC.RELAXED, None)
