"""Sums, products, compares, casts, reductions and scans as compiled kernels compute them."""

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime.interpreter import TensorHandle

from primer_fast.interpreter.bfloat16 import is_bfloat16, narrow, narrow_values, widen, widen_bits
from primer_fast.interpreter.registry import BUILDER, replaces


@replaces(BUILDER, "unary_op", "binary_op", "ternary_op", "create_erf", "create_rsqrt")
def _elementwise(original):
    """One operation in float32, rounded once, is the operation in bfloat16."""

    def elementwise(self, *operands):
        if operands[-1] is np.where or not any(map(is_bfloat16, operands)):  # a choice moves bits, whatever they are
            return original(self, *operands)
        result = original(self, *map(widen, operands))
        return result if result.data.dtype == np.bool_ else narrow(result.data)

    return elementwise


@replaces(BUILDER, "create_fma")
def _fma(original):
    """A fused multiply-add rounds once: the two-sum keeps what float64 loses, an odd last bit carries it on."""

    def fma(self, x, y, z):
        if not is_bfloat16(z):
            return original(self, x, y, z)
        x, y, z = (widen_bits(operand.data).astype(np.float64) for operand in (x, y, z))
        product = x * y  # exact
        total = product + z
        rest = total - product
        error = (product - (total - rest)) + (z - rest)  # total + error == product + z
        error = np.where(np.isfinite(total), error, 0)
        cut = np.where(error * total < 0, np.nextafter(total, 0), total)
        return narrow((cut.view(np.uint64) | (error != 0)).view(np.float64))

    return fma


@replaces(BUILDER, "cast_impl")
def _cast(original):
    """Casts to bfloat16 truncated."""

    def cast_impl(self, src, dst_type):
        if dst_type.scalar == tl.bfloat16:
            return src if is_bfloat16(src) else narrow(src.data)
        return original(self, widen(src), dst_type)

    return cast_impl


@replaces(BUILDER, "create_dot")
def _dot(original):
    """Products of bfloat16 are exact in float32; those in TF32 see the upper 19 bits of each factor."""

    def create_dot(self, a, b, acc, input_precision, *rest):
        a, b = widen(a), widen(b)
        if input_precision == ir.INPUT_PRECISION.TF32 and a.dtype.scalar == tl.float32:
            a, b = (TensorHandle(_as_tf32(operand.data), tl.float32) for operand in (a, b))
        return original(self, a, b, acc, input_precision, *rest)

    return create_dot


def _as_tf32(values: np.ndarray) -> np.ndarray:
    return (values.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


@replaces(BUILDER, "create_maxnumf")
def _maximum(original):
    """tl.maximum drops NaN on a GPU unless told otherwise."""
    return lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)


@replaces(BUILDER, "create_minnumf")
def _minimum(original):
    """As tl.maximum."""
    return lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)


@replaces(BUILDER, "create_clampf")
def _clamp(original):
    """As tl.maximum."""

    def create_clampf(self, x, low, high, propagate_nan):
        if propagate_nan != ir.PROPAGATE_NAN.NONE:
            return original(self, x, low, high, propagate_nan)
        return self.binary_op(self.binary_op(x, low, np.fmax), high, np.fmin)

    return create_clampf


@replaces("ReduceOps", "sum")
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
                data = narrow_values(widen_bits(low) + widen_bits(high))
            else:
                data = low + high
        return self.to_tensor(data.reshape(kept) if self.keep_dims else data[0], input.dtype)

    return total


@replaces("ReduceOps", "min_max")
def _min_max(original):
    """The order of the bits is not the order of the values."""

    def min_max(self, input, *reductions, **options):
        values = input[0] if isinstance(input, tuple) else input
        if values.dtype != tl.bfloat16:
            return original(self, input, *reductions, **options)
        result = original(self, self.to_tensor(widen_bits(values.handle.data), tl.float32), *reductions, **options)
        parts = result if isinstance(result, tuple) else (result,)
        for part in parts:
            if part.dtype == tl.float32:  # the value; the index stays as it is
                part.handle = narrow(part.handle.data)
                part.dtype = tl.bfloat16
                part.type = tl.block_type(tl.bfloat16, part.shape) if part.type.is_block() else tl.bfloat16
        return result

    return min_max


@replaces("ScanOps", "cumsum", "cumprod")
def _scan(original):
    """NumPy would add and multiply the bits; the general scan goes through the operations above."""

    def scan(self, input):
        return original(self, input) if input.dtype != tl.bfloat16 else self.generic_scan((input,))

    return scan
