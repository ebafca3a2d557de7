"""Tensor descriptors: what a tensor memory accelerator needs to know to move tiles of a tensor."""

import dataclasses
import os

import triton
from triton.tools.tensor_descriptor import TensorDescriptor

_DEFAULTS = {f.name: f.default for f in dataclasses.fields(TensorDescriptor) if f.default is not dataclasses.MISSING}
_checking = triton.knobs.runtime.interpret or os.environ.get("PRIMER_FAST_CHECK_DESCRIPTORS", "0") != "0"


def tensor_descriptor(base, shape, strides, block_shape):
    """``TensorDescriptor(base, shape, strides, block_shape)`` over tiles of ``block_shape``, all in elements.

    Checks are left to the interpreter, where every test passes through them: at each launch they would take longer than
    all that a launcher does besides. PRIMER_FAST_CHECK_DESCRIPTORS=1 in the environment asks for them everywhere.
    """
    if _checking:
        check(base, shape, strides, block_shape)
        return TensorDescriptor(base, shape, strides, block_shape)
    made = object.__new__(TensorDescriptor)
    made.__dict__.update(_DEFAULTS, base=base, shape=shape, strides=strides, block_shape=block_shape)
    return made


def strides_beside(described, axes, *tensors):
    """Of each tensor the strides of its first ``axes``, a tuple, as a kernel's arguments.

    Ones where a descriptor carries them, and for None: of a one Triton makes a constant, and no argument.
    """
    return [(1,) * axes if described or t is None else t.stride()[:axes] for t in tensors]


def check(base, shape, strides, block_shape) -> None:
    """Raise ValueError for a descriptor that the hardware does not take, or that would write an element twice.

    Source: CUDA driver API, cuTensorMapEncodeTiled.
    """
    itemsize = base.dtype.itemsize
    rules = (
        (1 <= len(shape) <= 5, "it must have 1 to 5 axes"),
        (len(shape) == len(strides) == len(block_shape), "shape, strides and block_shape must be of one length"),
        (base.data_ptr() % 16 == 0, f"the base must be on a 16-byte boundary; got {base.data_ptr():#x}"),
        (all(0 < n < 2**32 for n in shape), "each size must be from 1 to 2^32 - 1"),
        (all(s == 1 for s in strides[-1:]), "elements of the last axis must be adjacent"),
        (all(s > 0 for s in strides), "each stride must be positive"),
        (all(s * itemsize % 16 == 0 for s in strides[:-1]), "each stride must be a multiple of 16 bytes"),
        (all(s * itemsize < 2**40 for s in strides), "each stride must be below 2^40 bytes"),
        (all(0 < n <= 256 and n & (n - 1) == 0 for n in block_shape), "each block must be a power of 2, at most 256"),
        (all(n * itemsize >= 16 for n in block_shape[-1:]), "a block's rows must have at least 16 bytes"),
    )
    for holds, rule in rules:
        if not holds:
            raise ValueError(
                f"tensor_descriptor: {rule}; got {base.dtype} of shape {list(shape)}, strides {list(strides)} in "
                f"elements, blocks of {list(block_shape)}"
            )
