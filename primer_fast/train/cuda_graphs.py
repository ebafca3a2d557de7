"""The optimizer step as a CUDA graph: its kernels are recorded once, then launched as one.

A step launches hundreds of kernels, each some ten microseconds of the host's time. Where the model is small the GPU has
finished a kernel before the next is launched, and the host sets the pace; a recorded step is a single launch.

What is recorded are kernels on addresses. So a batch is copied into the buffers that were recorded, the learning rate
is a number on the device, and what a step measures is copied out before the next overwrites it.
Source: "CUDA Graphs" in PyTorch's notes, whole-network capture.
"""

__all__ = [
    "GPU_FLOPS",
    "HOST_SECONDS",
    "MOST",
    "WARM_UP",
    "CudaGraphs",
    "RecordedUpdate",
    "Recording",
    "Update",
    "obstacle",
    "pays",
    "recorded",
]

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from primer_fast.train.state import TrainState
from primer_fast.train.steps import record

WARM_UP = 3  # steps as any other, in which kernels are compiled, libraries initialised and optimizer states made
MOST = 16  # recordings of a step that are kept, each of other sizes: the one used longest ago goes first
GPU_FLOPS = 4e14  # a second, an estimate: large 16-bit products reach it on one H100
HOST_SECONDS = 5e-5  # an estimate too: to launch what one weight tensor takes part in, five kernels of 10 us

Update = Callable[..., None]  # (state, *arguments): one optimizer step; what it measures is appended to state.window


class CudaGraphs:
    """Records the kernels that functions launch on one GPU.

    The recordings use the same memory, so no two of them may run at a time, and one at least must live on while
    another is made.
    """

    device_type = "cuda"
    rate = torch.float32  # what fused optimizers read a learning rate on the GPU as

    def __init__(self, device: torch.device):
        self.device, self.memory = device, torch.cuda.graph_pool_handle()
        self.side = torch.cuda.Stream(device)

    def warm_up(self, step: Callable[[], None]) -> None:
        """``step()`` on the stream that the capture will run it on."""
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):
            step()
        torch.cuda.current_stream(self.device).wait_stream(self.side)

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """Record what ``step()`` launches; nothing runs until what this returns is called."""
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            with torch.cuda.graph(graph, pool=self.memory, stream=self.side):
                step()
        except BaseException:
            torch.cuda.set_stream(before)  # torch leaves the recording's in place where that fails
            raise
        return graph.replay


def recorded(
    update: Update,
    state: TrainState,
    *,
    asked: bool | None,  # None: where it pays
    batch: int,  # samples of a full batch; another number of them, as in a last batch, is run kernel by kernel
    rows: int,  # samples or tokens in a micro-batch
    procedure: str,  # what warnings and errors call it
) -> Update:
    """``update``, as a CUDA graph where ``asked`` and what runs allow it; results are bitwise the same.

    None records where ``pays`` says so. True records wherever it can, and warns (RuntimeWarning) with the reason where
    it cannot. The state must not be loaded anew while the result is in use: the graph knows its tensors by address.
    """
    if asked is False:
        return update
    reason = obstacle(state)
    if reason is not None:
        if asked:
            message = f"{procedure}: no CUDA graph, kernels are launched one by one: {reason}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        return update
    if asked is None and not pays(state.model, rows):
        return update
    return RecordedUpdate(update, state, batch, procedure)


def obstacle(state: TrainState) -> str | None:
    """Why a step on ``state`` cannot be recorded, or None."""
    devices = {p.device for p in state.model.parameters()}
    if len(devices) != 1 or next(iter(devices)).type != CudaGraphs.device_type:
        return f"the model must be on one GPU; it is on {', '.join(sorted(map(str, devices)))}"
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "the run has several processes, whose gradients are exchanged outside of the graph"
    if not all(group.get("fused") for group in state.optimizer.param_groups):
        return "the optimizer must be fused: others read numbers back from the GPU"
    return None


def pays(model: torch.nn.Module, rows: int) -> bool:
    """Whether the host takes longer to launch a step than the GPU to run it, by an estimate of both.

    The GPU has six operations for each weight and row (two forward, four backward; Kaplan et al. 2020), more where a
    convolution uses a weight at many places. For models whose step is long a graph would save nothing, and would keep
    the memory of all activations to itself.
    """
    weights = [p.numel() for p in model.parameters() if p.requires_grad]
    return 6 * sum(weights) * rows / GPU_FLOPS < HOST_SECONDS * len(weights)


@dataclass(frozen=True)
class Recording:
    """One step on a batch of certain sizes."""

    replay: Callable[[], None]
    batch: list[Tensor]  # what it reads
    measured: dict[str, Tensor]  # what it writes
    steps: int  # that it counts in state.step


class RecordedUpdate:
    """``update`` on full batches: WARM_UP steps as they are, then one recording, replayed from then on.

    Arguments that are tensors are the batch, the first with a row for each sample. Where their sizes differ from step
    to step, each sizes have a recording of their own, up to MOST of them. All other arguments must stay what they are,
    and so must the optimizer's settings but for the learning rate, which becomes a tensor here.

    Raises:
        RuntimeError: the step cannot be recorded, as one that reads from the device.
    """

    def __init__(self, update: Update, state: TrainState, batch: int, procedure: str):
        self.update, self.batch, self.procedure = update, batch, procedure
        device = next(state.model.parameters()).device
        self.graphs = CudaGraphs(device)
        self.warmed: Counter[tuple[torch.Size, ...]] = Counter()  # steps of these sizes that were run as any other
        self.recordings: dict[tuple[torch.Size, ...], Recording] = {}  # by sizes, the one used last at the end
        for group in state.optimizer.param_groups:
            group["lr"] = torch.as_tensor(group["lr"]).to(device, self.graphs.rate, copy=True)

    def __call__(self, state: TrainState, *arguments) -> None:
        tensors = [a for a in arguments if isinstance(a, Tensor)]
        sizes = tuple(t.shape for t in tensors)
        if len(tensors[0]) != self.batch:
            self.update(state, *arguments)
            return
        if self.warmed[sizes] < WARM_UP:
            self.graphs.warm_up(lambda: self.update(state, *arguments))
            self.warmed[sizes] += 1
            return
        found = self.recordings.pop(sizes, None) or self._record(state, arguments)
        self.recordings[sizes] = found
        if len(self.recordings) > MOST:
            oldest = next(iter(self.recordings))
            del self.recordings[oldest], self.warmed[oldest]
        for buffer, tensor in zip(found.batch, tensors, strict=True):
            buffer.copy_(tensor)
        found.replay()
        state.step += found.steps
        record(state, **{name: value.clone() for name, value in found.measured.items()})

    def _record(self, state: TrainState, arguments) -> Recording:
        buffers = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
        step, window, state.window = state.step, state.window, {}
        capturable = [group for group in state.optimizer.param_groups if "capturable" in group]
        try:
            for group in capturable:
                group["capturable"] = True
            replay = self.graphs.capture(lambda: self.update(state, *buffers))
            measured = {name: values[-1] for name, values in state.window.items()}
            return Recording(replay, [b for b in buffers if isinstance(b, Tensor)], measured, state.step - step)
        except RuntimeError as error:
            raise RuntimeError(
                f"{self.procedure}: the step cannot be recorded as a CUDA graph; cuda_graphs=False trains without"
            ) from error
        finally:
            state.step, state.window = step, window
            for group in capturable:
                group["capturable"] = False  # in steps that are run it would only warn
