"""What only a GPU can show of an op: layouts that descriptors take, graphs, threads, streams, two runs bit by bit.

Each function here runs one case and returns a row for each tensor. But for the layouts, which are judged as values are,
what is compared must be equal bit by bit.
"""

import math
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from primer_fast import functional
from primer_fast.proof import native
from primer_fast.proof.inputs import LAYOUTS, allocate
from primer_fast.proof.native import ATTENTION, CheckedTensor, Results, draw, run
from primer_fast.proof.verify import device
from primer_fast.reference.case import Case
from primer_fast.reference.ops import OPS

THREADS = 3
_DELAY = 20_000_000  # cycles, some ten milliseconds: time for the other stream to do what it should not
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# By op the names of three cases: one for layouts, a production case of moderate size, a small one
_CASES = {
    "linear": ("edges_aligned", "gpt2_qkv", "primer_first"),
    "mlp": ("edges_four", "gpt2", "primer"),
    "conv2d": ("boxes_exact", "resnet_3x3_256", "primer"),
    ATTENTION: ("heads_last", "gpt2", "head_odd"),
    "linear_cross_entropy": ("offset", "t5", "vector"),
    "linear_log_prob": ("offset", "gpt2", "vector"),
    "layer_norm": ("offset", "gpt2_residual", "pre_norm"),
    "embedding": ("offset", "gpt2_ids", "primer"),
    "max_pool2d": ("channels_last", "stem", "digits"),
}


def case_named(op: str, name: str) -> Case:
    """The case of an op's reference that has this name."""
    return OPS[op].case(name)


def usual_case(op: str, small: bool = False) -> Case:
    """The case that graphs, threads and streams are tried on: of production size, or small."""
    return case_named(op, _CASES[op][2 if small else 1])


def layout_cases(op: str) -> list[Case]:
    """One case in every layout that its arrays of floats can have, all of them in the same where they can.

    Weights are not expanded: where all their rows are the same, gradients cancel to nothing.
    """
    case = replace(case_named(op, _CASES[op][0]), layouts={})
    floats, made = [name for name in case.shapes if name not in case.dtypes], []
    for layout in LAYOUTS:
        chosen = [name for name in floats if layout != "expanded" or not ("weight" in name or "bias" in name)]
        layouts = {name: layout for name in chosen if _can_be(case.shapes[name], layout)}
        if layouts:
            made.append(replace(case, name=f"{case.name} {layout}", layouts=layouts))
    return made


def _can_be(shape: tuple[int, ...], layout: str) -> bool:
    try:
        allocate(shape, layout, torch.float32, "meta")
    except ValueError:
        return False
    return True


def layouts(op: str, case: Case, dtype: torch.dtype) -> list[CheckedTensor]:
    """A case with layouts against its truth."""
    return native.check(op, case, dtype, label="layouts")


def one_pass(op: str, case: Case, dtype: torch.dtype) -> list[CheckedTensor]:
    """Attention's backward that adds in no fixed order, against its truth: within the same budget."""
    return native.check(op, case, dtype, label="one pass", within=functional.fast_attention_backward)


def bitwise(op: str, case: Case, dtype: torch.dtype) -> list[CheckedTensor]:
    """Two runs of forward and backward."""
    arrays = draw(op, case, dtype, device())
    first, upstream = run(op, case, arrays)
    return compared("bitwise", op, case, dtype, [(run(op, case, arrays, upstream)[0], first)])


def graph(op: str, case: Case, dtype: torch.dtype) -> list[CheckedTensor]:
    """Forward and backward as a CUDA graph, replayed on inputs that have changed since, against eager calls."""
    arrays = draw(op, case, dtype, device())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are loaded before the capture, in which nothing can be
        first, upstream = run(op, case, arrays)
    torch.cuda.current_stream().wait_stream(side)
    recording, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(recording):
            recorded, _ = run(op, case, arrays, upstream)
    except BaseException:
        torch.cuda.set_stream(here)  # torch leaves the recording's in place where that fails
        raise
    pairs = []
    for seed in (1, 0):
        for name, values in draw(op, case, dtype, device(), seed).items():
            arrays[name].copy_(values)
        for dy, values in zip(upstream, native.upstream_of(upstream, seed), strict=True):
            dy.copy_(values)
        recording.replay()
        want = run(op, case, arrays, upstream)[0] if seed else first
        pairs.append(({name: t.clone() for name, t in recorded.items()}, want))
    rows = compared("graph", op, case, dtype, pairs)
    recording.reset()
    return rows


def threads(op: str, case: Case, dtype: torch.dtype) -> list[CheckedTensor]:
    """Backward from several threads at once, of graphs that this thread built or that they build themselves."""
    arrays = draw(op, case, dtype, device())
    want, upstream = run(op, case, arrays)
    built = [native.forward(op, case, arrays) if number % 2 else None for number in range(THREADS)]
    start = threading.Barrier(THREADS, timeout=30)

    def work(graph) -> Results:
        start.wait()
        outputs, leaves = graph or native.forward(op, case, arrays)
        return native.backward(op, outputs, leaves, upstream)

    with ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(work, built))
    return compared("threads", op, case, dtype, [(got, want) for got in results])


def streams(op: str, case: Case, dtype: torch.dtype) -> list[CheckedTensor]:
    """Two streams run at once, and each writes its inputs late.

    Meanwhile the current stream allocates memory and fills it. A kernel that is launched elsewhere reads inputs that
    are not yet there; memory that is given back too early is overwritten.
    """
    drawn = [draw(op, case, dtype, device(), seed) for seed in (0, 1)]
    first, upstream = run(op, case, drawn[0])
    want = [first, run(op, case, drawn[1], upstream)[0]]
    late = [draw(op, case, dtype, device(), seed=2) for _ in drawn]  # other values, until the stream has written
    here, got = torch.cuda.current_stream(), []
    for arrays, buffers in zip(drawn, late, strict=True):
        side = torch.cuda.Stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            torch.cuda._sleep(_DELAY)
            for name, values in arrays.items():
                buffers[name].copy_(values)
            got.append((side, run(op, case, buffers, upstream)[0]))
    for t in want[0].values():  # of the sizes that the op itself asks for
        for _ in range(4):
            torch.empty_like(t).fill_(1)
    for side, _ in got:
        here.wait_stream(side)
    return compared("streams", op, case, dtype, list(zip((results for _, results in got), want, strict=True)))


def second_gpu(op: str, case: Case, dtype: torch.dtype) -> list[CheckedTensor]:
    """Arrays on another GPU than the current one, which must be of the same kind, against the same here."""
    arrays = draw(op, case, dtype, device())
    want, upstream = run(op, case, arrays)
    there = {name: t.to("cuda:1") for name, t in arrays.items()}
    got, _ = run(op, case, there, tuple(dy.to("cuda:1") for dy in upstream))
    return compared("second GPU", op, case, dtype, [({name: t.to(device()) for name, t in got.items()}, want)])


def no_second_gpu() -> str:
    """Why ``second_gpu`` has nothing to try here, or ""."""
    if torch.cuda.device_count() < 2:
        return "there is one GPU"
    names = [torch.cuda.get_device_name(number) for number in range(2)]
    return "" if names[0] == names[1] else f"there are two kinds of GPU: {' and '.join(names)}"


def compared(
    check: str, op: str, case: Case, dtype: torch.dtype, pairs: Iterable[tuple[Results, Results]]
) -> list[CheckedTensor]:
    """A row for each tensor: over all pairs of what was got and what it must be, bit by bit."""
    figures: dict[str, list[Tensor]] = {}
    for got, want in pairs:
        for name, right in want.items():
            figures.setdefault(name, []).append(_apart(got[name], right))
    rows = []
    for name, table in figures.items():
        different, error = torch.stack(table).amax(dim=0).tolist()
        reason = f"{different:.0f} elements differ" if different else ""
        finite = error if math.isfinite(error) else None
        rows.append(
            CheckedTensor(check, op, case.name, str(dtype)[6:], name, finite, 0.0, passed=not different, reason=reason)
        )
    return rows


def _apart(got: Tensor, want: Tensor) -> Tensor:
    """-> how many elements differ in a bit, and the largest difference."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return torch.tensor([max(want.numel(), 1), math.inf], dtype=torch.float64, device=want.device)
    integers = _INTEGERS[want.element_size()]
    different = torch.count_nonzero(got.view(integers) != want.view(integers))
    return torch.stack([different.double(), native.worst(got, want)])


CHECKS: dict[str, Callable[[str, Case, torch.dtype], list[CheckedTensor]]] = {
    "values": native.check,
    "bitwise": bitwise,
    "graph": graph,
    "streams": streams,
    "threads": threads,
    "one pass": one_pass,
    "layouts": layouts,
    "second GPU": second_gpu,
}
