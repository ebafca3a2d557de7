"""python -m primer_fast.bench.stages.rehearsal MODULE [ARGS ...]: run a GPU's program on a CPU, to see that it runs.

A stand-in takes the place of CUDA in this process: "cuda" is the CPU, events are the host's clock, a graph is a list
of operators. With TRITON_INTERPRET=1 set before, kernels run in Triton's interpreter. Results are right, times mean
nothing. What is started from here by ``multiprocessing`` has the stand-in too.
"""

import contextlib
import importlib
import sys
import threading
import time
from types import SimpleNamespace
from unittest import mock

import torch
import torch._dynamo  # before the stand-in: it wants to know each function of torch.cuda by one name
import triton
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

from primer_fast import backend
from primer_fast.bench.environment import STAND_IN
from primer_fast.proof.targets import TARGETS, StandInDriver

_PROPERTIES = SimpleNamespace(
    name=STAND_IN, major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, L2_cache_size=1 << 12
)


def _moved(value):
    """``value`` with the CPU in the place of a GPU."""
    if isinstance(value, str) and value.split(":")[0] == "cuda":
        return "cpu"
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return value


class _OnCpu(TorchFunctionMode):
    """Every call of PyTorch that names a GPU gets the CPU instead."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*map(_moved, args), **{name: _moved(value) for name, value in (kwargs or {}).items()})


class Operators(TorchDispatchMode):
    """Runs and keeps every operator that is called inside, as the capture of a CUDA graph keeps kernels.

    ``undo`` restores the tensors that were there before, because capturing a graph runs nothing. ``replay`` calls the
    operators again on the same tensors. Like a graph it runs no Python, so a number that Python computed during the
    capture keeps its first value.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.made, self.before = [], set(), {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        for storage in _storages((args, kwargs)):
            if storage.data_ptr() not in self.made and storage.data_ptr() not in self.before:
                self.before[storage.data_ptr()] = storage, storage.clone()
        out = func(*args, **(kwargs or {}))
        self.made |= {storage.data_ptr() for storage in _storages(out) if storage.data_ptr() not in self.before}
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def undo(self) -> None:
        for storage, value in self.before.values():
            storage.copy_(value)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _storages(tree) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class _Graph:
    """torch.cuda.CUDAGraph."""

    operators: Operators

    def replay(self) -> None:
        self.operators.replay()

    def reset(self) -> None:
        self.operators.calls.clear()


@contextlib.contextmanager
def _graph(graph: _Graph, pool=None, stream=None, capture_error_mode="global"):
    """torch.cuda.graph."""
    random = torch.get_rng_state()
    graph.operators = Operators()
    with graph.operators:
        yield
    graph.operators.undo()
    torch.set_rng_state(random)


class _Event:
    """torch.cuda.Event: the host's clock. The device has never begun when the host asks, so queues count as full."""

    def __init__(self, enable_timing=False, blocking=False, interprocess=False):
        self.at = 0.0

    def record(self, stream=None) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: "_Event") -> float:
        return max(1e3 * (end.at - self.at), 1e-6)

    def query(self) -> bool:
        return False

    def synchronize(self) -> None: ...

    def wait(self, stream=None) -> None: ...


class _Stream:
    """torch.cuda.Stream; all of them are the host's own order."""

    cuda_stream = 0

    def __init__(self, device=None, priority=0): ...

    def synchronize(self) -> None: ...

    def wait_stream(self, stream) -> None: ...

    def wait_event(self, event) -> None: ...

    def record_event(self, event=None) -> _Event:
        event = event or _Event()
        event.record()
        return event

    def query(self) -> bool:
        return True


class _Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls, _moved(device))


def _nothing(*args, **kwargs) -> None: ...


def _nothing_around(*args, **kwargs):
    return contextlib.nullcontext()


def _uncompiled(function=None, **options):
    """torch.compile: the function as it is."""
    return function if function is not None else lambda decorated: decorated


_FOR_GOOD = contextlib.ExitStack()  # never left
_STREAM = _Stream()
_CUDA = {
    "is_available": lambda: True, "is_initialized": lambda: True, "init": _nothing, "device_count": lambda: 1,
    "current_device": lambda: 0, "set_device": _nothing, "device": _nothing_around, "device_of": _nothing_around,
    "get_device_name": lambda device=None: STAND_IN, "get_device_capability": lambda device=None: (9, 0),
    "get_device_properties": lambda device=None: _PROPERTIES, "is_bf16_supported": lambda *args: True,
    "synchronize": _nothing, "empty_cache": _nothing, "ipc_collect": _nothing, "_sleep": _nothing,
    "memory_allocated": lambda device=None: 0, "max_memory_allocated": lambda device=None: 0,
    "memory_reserved": lambda device=None: 0, "max_memory_reserved": lambda device=None: 0,
    "reset_peak_memory_stats": _nothing, "mem_get_info": lambda device=None: (80 << 30, 80 << 30),
    "Event": _Event, "Stream": _Stream, "stream": _nothing_around, "current_stream": lambda device=None: _STREAM,
    "default_stream": lambda device=None: _STREAM, "set_stream": _nothing,
    "CUDAGraph": _Graph, "graph": _graph, "graph_pool_handle": lambda: (0, 0),
    "is_current_stream_capturing": lambda: isinstance(_get_current_dispatch_mode(), Operators),
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
    "default_generators": (torch.default_generator,),
}  # fmt: skip


@contextlib.contextmanager
def stand_in():
    """Inside, the stand-in is in CUDA's place; Triton's driver is not its business."""
    from primer_fast.train.cuda_graphs import CudaGraphs

    run = threading.Thread.run

    def run_on_cpu(thread: threading.Thread) -> None:  # a mode is its thread's own
        with _OnCpu():
            run(thread)

    cuda_graphs = {"device_type": "cpu", "rate": torch.float64}  # what fused optimizers of a CPU read
    with (
        mock.patch.multiple(torch.cuda, **_CUDA),
        mock.patch.multiple(torch, Generator=_Generator, compile=_uncompiled),
        mock.patch.multiple(CudaGraphs, **cuda_graphs),
        mock.patch.object(threading.Thread, "run", run_on_cpu),
        _OnCpu(),
    ):
        yield


def install() -> None:
    """Put the stand-in in CUDA's place, in this process, for good."""
    torch.set_num_threads(1)  # what is rehearsed is small
    if not backend.interpreting:
        triton.runtime.driver.set_active(StandInDriver(TARGETS["sm_90"]))
    _FOR_GOOD.enter_context(stand_in())


def main(argv: list[str]) -> int:
    """Run the ``main`` of a module with the arguments behind its name; its exit status."""
    name, *arguments = argv
    install()
    module = importlib.import_module(name)
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{name}.__main__")
    return module.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
if __name__ == "__mp_main__":  # in a process that the rehearsed program has started
    install()
