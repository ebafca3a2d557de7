"""Tensor descriptors: what a tensor memory accelerator needs to know to move tiles of a tensor."""

import dataclasses

import triton
from triton.tools.tensor_descriptor import TensorDescriptor

_DEFAULTS = {f.name: f.default for f in dataclasses.fields(TensorDescriptor) if f.default is not dataclasses.MISSING}
_checking = triton.knobs.runtime.interpret


def tensor_descriptor(base, shape, strides, block_shape):
    """``TensorDescriptor(base, shape, strides, block_shape)`` over tiles of ``block_shape``, all in elements.

    Its checks are left to the interpreter, where every test passes through them: at each launch they would take longer
    than all that a launcher does besides.
    """
    if _checking:
        return TensorDescriptor(base, shape, strides, block_shape)
    made = object.__new__(TensorDescriptor)
    made.__dict__.update(_DEFAULTS, base=base, shape=shape, strides=strides, block_shape=block_shape)
    return made
