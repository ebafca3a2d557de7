"""Loads, stores and atomics: only the tensor arguments of a launch may be touched, and atomics know bfloat16."""

__all__ = ["descriptor_reduce"]

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import interpreter as raw_memory
from triton._C.libtriton import ir
from triton.runtime.interpreter import TensorHandle

from primer_fast.interpreter.bfloat16 import is_bfloat16, narrow_values, widen_bits
from primer_fast.interpreter.registry import BUILDER, replaces

# (first byte, byte past the last, name) of each tensor argument of the launch under way
_extents: list[tuple[int, int, str]] = []


@replaces("GridExecutor", "_init_args_hst")
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


@replaces(BUILDER, "create_masked_load")
def _load(original):
    """A GPU reads what is there, or faults; never what the author meant."""

    def create_masked_load(self, pointers, mask, *rest, **options):
        _check_addresses("load", pointers, mask)
        return original(self, pointers, _as_bool(mask), *rest, **options)

    return create_masked_load


@replaces(BUILDER, "create_masked_store")
def _store(original):
    """As a load, and it would corrupt this process."""

    def create_masked_store(self, pointers, value, mask, *rest, **options):
        _check_addresses("store", pointers, mask)
        return original(self, pointers, value, _as_bool(mask), *rest, **options)

    return create_masked_store


@replaces(BUILDER, "create_atomic_rmw")
def _atomic(original):
    """There was no addition for bfloat16; two lanes may share an address, so one lane after the other."""

    def create_atomic_rmw(self, op, pointers, value, mask, *rest):
        _check_addresses("atomic", pointers, mask)
        if not is_bfloat16(value):
            return original(self, op, pointers, value, mask, *rest)
        if op != ir.ATOMIC_OP.FADD:
            raise NotImplementedError(f"interpreter: atomic {op} of bfloat16")
        addresses, values, mask = np.broadcast_arrays(pointers.data, widen_bits(value.data), mask.data)
        before = np.zeros(addresses.shape, dtype=np.uint16)
        one, nothing = np.ones(1, dtype=bool), np.zeros(1, dtype=np.uint16)
        for lane in zip(*np.nonzero(mask), strict=True):
            address = addresses[lane].reshape(1)
            old = raw_memory.load(address, one, nothing, np.dtype(np.uint16))
            raw_memory.store(address, narrow_values(widen_bits(old) + values[lane]), one)
            before[lane] = old[0]
        return TensorHandle(before, tl.bfloat16)

    return create_atomic_rmw


def descriptor_reduce(self, kind, descriptor, value, offsets):
    """``descriptor.atomic_add``, which the interpreter lacks and the compiler has."""
    if kind != ir.DESCRIPTOR_REDUCE_KIND.ADD:
        raise NotImplementedError(f"interpreter: descriptor reduction {kind}")
    pointers, mask = descriptor.materialize_pointers(offsets)
    op = ir.ATOMIC_OP.FADD if value.dtype.scalar.is_floating() else ir.ATOMIC_OP.ADD
    mask = mask if isinstance(mask, TensorHandle) else TensorHandle(mask, tl.int1)  # a handle since Triton 3.9
    self.create_atomic_rmw(op, pointers, value, mask, ir.MEM_SEMANTIC.RELAXED, None)
