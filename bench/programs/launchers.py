"""What a call of ours costs the host, beside a bare launch of Triton's and torch's own operator on a tiny tensor.

Without a GPU each launch goes through Triton to where its C code would call CUDA, and ends there (proof/stubbed.py);
what CUDA itself takes is missing on both sides. On a GPU it is the host's time to queue the same calls.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from primer_fast import functional as F
from primer_fast.bench import goals
from primer_fast.bench.op import EAGER, OURS
from primer_fast.bench.peers import NotAvailable
from primer_fast.bench.programs.wrappers import HostClock, pairs
from primer_fast.bench.report import ProgramRow
from primer_fast.bench.timing import MIN_ROUNDS, Timing, WallClock, time_interleaved
from primer_fast.kernels.launch.entry import entry
from primer_fast.proof.stubbed import stubbed

BARE, AUTOGRAD = "a bare Triton launch", "autograd alone"
STEP = 8  # calls that share the start of a backward, as those of a model do
GPT2_CALLS = {  # of a training step of GPT-2 124M: twelve layers, and what is before and after them
    "linear": 4 * 12, "scaled_dot_product_attention": 12, "layer_norm": 2 * 12 + 1, "embedding": 1,
    "linear_cross_entropy": 1,
}  # fmt: skip


@entry
def _bare_kernel(out_ptr, value, BLOCK: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, BLOCK), value)


class Call(NamedTuple):
    """A call of an op, and the tensors at which it has gradients."""

    function: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]


def calls(device: str) -> dict[str, Call]:
    """By op, in bfloat16, small: the host takes as long for large tensors."""

    def empty(*shape):
        return torch.zeros(shape, dtype=torch.bfloat16, device=device)

    image, kernel = (empty(*s).contiguous(memory_format=torch.channels_last) for s in ((2, 64, 14, 14), (64, 64, 3, 3)))
    heads, table, ids = empty(2, 12, 128, 64), empty(512, 128), torch.zeros(64, dtype=torch.int64, device=device)
    return {
        "linear": Call(lambda x, w, b: F.linear(x, w, b, activation="gelu"), (empty(64, 128), table, empty(512))),
        "mlp": Call(
            lambda x, v, w, b, c: F.mlp(x, (v, w), (b, c)),
            (empty(64, 128), table, empty(128, 512), empty(512), empty(128)),
        ),
        "conv2d": Call(lambda x, w, b: F.conv2d(x, w, b, padding=1, activation="relu"), (image, kernel, empty(64))),
        "max_pool2d": Call(lambda x: F.max_pool2d(x, 3, 2, 1), (image,)),
        "layer_norm": Call(lambda x, w, b: F.layer_norm(x, (128,), w, b), (empty(64, 128), empty(128), empty(128))),
        "embedding": Call(lambda w: F.embedding(ids, w), (table,)),
        "scaled_dot_product_attention": Call(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            (heads, torch.empty_like(heads), torch.empty_like(heads)),
        ),
        "linear_cross_entropy": Call(lambda x, w: F.linear_cross_entropy(x, w, ids), (empty(64, 128), table)),
        "linear_log_prob": Call(lambda x, w: F.linear_log_prob(x, w, ids), (empty(64, 128), table)),
    }  # fmt: skip


class _Nothing(torch.autograd.Function):
    """What an op of ours asks of autograd, without the op."""

    @staticmethod
    def forward(ctx, y, grads, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.grads = grads
        return y.detach()

    @staticmethod
    def backward(ctx, dy):
        assert len(ctx.saved_tensors) == len(ctx.needs_input_grad) - 2
        return None, None, *ctx.grads


def both_ways(call: Call, count: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """Two functions: ``count`` calls and one backward through all of them, and autograd's part of that.

    For the second, each call is a function that computes nothing: it returns tensors that are there already. Each call
    has tensors of its own, as the layers of a model have.
    """
    leaves = [tuple(t.detach().clone().requires_grad_() for t in call.tensors) for _ in range(count)]
    flat = [t for each in leaves for t in each]
    y = call.function(*leaves[0]).detach()
    dy, grads = [torch.ones_like(y)] * count, tuple(torch.zeros_like(t) for t in leaves[0])
    return (
        lambda: torch.autograd.grad([call.function(*each) for each in leaves], flat, dy),
        lambda: torch.autograd.grad([_Nothing.apply(y, grads, *each) for each in leaves], flat, dy),
    )


@contextlib.contextmanager
def _machine(device: str) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # torch's own operators on the CPU would wait for each other's
    try:
        real = torch.empty(0, device=device).is_cuda  # not so where a run on a GPU is rehearsed without one
        with contextlib.nullcontext() if real else stubbed():
            yield
    finally:
        torch.set_num_threads(threads)


def launchers(device: str, seconds: float, with_compile: bool, small: bool = False) -> list[ProgramRow]:
    """Rows of each op's forward without gradients, of its forward and backward, and of all of GPT-2's step.

    Forward and backward are timed for a call alone, and for one of ``STEP`` calls that share a backward. The latter add
    up to GPT-2's step.

    Raises:
        NotAvailable: kernels are interpreted.
        Exception: a call failed; whatever it raised.
    """
    if triton.knobs.runtime.interpret:
        raise NotAvailable("kernels are interpreted in this process")
    clock, least = HostClock(1 if small else 50) if device == "cuda" else WallClock(), 1 if small else MIN_ROUNDS
    calls_before = 2 if small else 100  # compile, prepare, and see most addresses that the memory will have
    setting = "host time" if device == "cuda" else "host time up to the driver"
    rows, step = [], dict.fromkeys((OURS, BARE, AUTOGRAD), 0.0)
    tiny = pairs("cpu")
    with _machine(device):
        out = torch.zeros(16, dtype=torch.bfloat16, device=device)
        bare = lambda: _bare_kernel[(1,)](out, 5, 16)  # noqa: E731
        for op, call in calls(device).items():
            with torch.no_grad():
                functions = {OURS: lambda call=call: call.function(*call.tensors), BARE: bare, EAGER: tiny[op][1]}
                forward = _timed(functions, clock, seconds / 60, least, calls_before)
            rows += _rows(f"launch of {op}", f"forward, {setting}", forward, goals.FORWARD)
            for count, what in (1, "both ways"), (STEP, f"both ways, of {STEP} in one backward"):
                ours, autograd = both_ways(call, count)
                both = _timed({OURS: ours, BARE: bare, AUTOGRAD: autograd}, clock, seconds / 30, least, calls_before)
                both = {name: t if name == BARE else t.of_one(count) for name, t in both.items()}
                rows += _rows(f"launch of {op}", f"{what}, {setting}", both, goals.BOTH_WAYS)
            for name, timing in both.items():
                step[name] += GPT2_CALLS.get(op, 0) * timing.median_ms
    sums = {name: Timing((total,)) for name, total in step.items()}
    return rows + _rows("launch of GPT-2's step", f"the sum of its calls, both ways, {setting}", sums, None)


def _timed(functions, clock, seconds, least, calls_before) -> dict[str, Timing]:
    for function in functions.values():
        for _ in range(calls_before):
            function()
    timings = time_interleaved(functions, clock, seconds, least)
    for timing in timings.values():
        if not isinstance(timing, Timing):
            raise timing
    return timings


def _rows(name: str, setting: str, timings: dict[str, Timing], goal: goals.Goal | None) -> list[ProgramRow]:
    found = {provider: ProgramRow(name, setting, provider, unit="calls") for provider in timings}
    for provider, row in found.items():
        row.time_as(timings[provider], timings[OURS], 1)
    if goal is not None:
        found[OURS].targets.append(goal.judged(1 / found[BARE].versus))
    return list(found.values())
