"""A proof that needs no GPU: a step never waits for the device to learn a number."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from primer_fast.kernels.launch.prepared import unprepared

READS = {  # operators whose host code needs a value, or whose result has as many elements as the data say
    "_local_scalar_dense", "item", "nonzero", "nonzero_numpy", "is_nonzero", "masked_select", "equal", "allclose",
    "unique", "_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive", "bincount", "histc",
    "argwhere", "_assert_async", "repeat_interleave",
}  # fmt: skip
COPIES = {"_to_copy", "copy_", "to"}


class HostSync(RuntimeError):
    """An operator that a CUDA graph cannot hold."""


class NoHostSync(TorchDispatchMode):
    """Raises HostSync where an operator reads a tensor into the host, copies between devices, or sizes by data.

    Ops run as they do where no mode looks on, not as one operator that hides what it does. Indexing with a bool tensor
    is a nonzero in disguise. ``calls`` lists what went through: operator, shapes, dtypes and strides of its results.
    """

    def __init__(self):
        super().__init__()
        self.calls = []
        self._patch, self._as_they_are = pytest.MonkeyPatch(), unprepared()

    def __enter__(self):
        self._patch.setattr("primer_fast.functional.operator._len_torch_dispatch_stack", lambda: 0)
        self._as_they_are.__enter__()  # a prepared launcher is recorded with operators of its own
        return super().__enter__()

    def __exit__(self, *error):
        self._as_they_are.__exit__(*error)
        self._patch.undo()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        assert func.namespace != "primer_fast", f"{name} hides what it does"
        if name in READS:
            raise HostSync(name)
        if name.startswith("index") and any(t.dtype in (torch.bool, torch.uint8) for t in _indices(name, args)):
            raise HostSync(f"{name} with a mask")
        out = func(*args, **kwargs)
        devices = {t.device for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)}
        if name in COPIES and len(devices) > 1:
            raise HostSync(f"{name} between {', '.join(sorted(map(str, devices)))}")
        results = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.calls.append((name, [(t.shape, t.dtype, t.stride()) for t in results]))
        return out


def _indices(name, args):
    if name not in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return []
    return [t for t in args[1] if isinstance(t, torch.Tensor)]
