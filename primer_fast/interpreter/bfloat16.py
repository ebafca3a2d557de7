"""bfloat16 in NumPy, which lacks it: the upper 16 bits of a float32, kept as uint16."""

__all__ = ["is_bfloat16", "narrow", "narrow_values", "widen", "widen_bits"]

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import TensorHandle


def widen_bits(bits: np.ndarray) -> np.ndarray:
    """uint16 bits of bfloat16 -> the same values as float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow_values(values: np.ndarray) -> np.ndarray:
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
    nearest = values.astype(np.float32)
    cut = np.where(np.abs(nearest) > np.abs(values), np.nextafter(nearest, np.float32(0)), nearest)
    return (cut.view(np.uint32) | (cut != values)).view(np.float32)


def is_bfloat16(operand) -> bool:
    return type(operand) is TensorHandle and operand.dtype.scalar.name == tl.bfloat16.name


def widen(operand):
    """A bfloat16 handle -> float32; anything else as it is."""
    return TensorHandle(widen_bits(operand.data), tl.float32) if is_bfloat16(operand) else operand


def narrow(values: np.ndarray) -> TensorHandle:
    return TensorHandle(narrow_values(values), tl.bfloat16)
