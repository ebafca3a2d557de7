"""What calling our functions costs beside torch.nn.functional on tensors so small that nothing else takes time."""

import torch
import torch.nn.functional as torch_F

from primer_fast import functional as F
from primer_fast.bench import goals
from primer_fast.bench.op import EAGER, OURS
from primer_fast.bench.peers import noted
from primer_fast.bench.report import OK, ProgramRow
from primer_fast.bench.timing import MIN_ROUNDS, WallClock, quartiles, time_interleaved


class HostClock(WallClock):
    """Host time to queue a call on a GPU. The queue is empty at first and too short to fill up."""

    def __init__(self, calls: int):
        self.calls = calls

    def sampler(self, function, min_ms: float = 1.0):
        def sample() -> float:
            torch.cuda.synchronize()
            return self._elapsed_ms(function, self.calls) / self.calls

        return sample


def pairs(device: str, small: bool = True) -> dict[str, tuple]:
    """By op: our call and torch's, without arguments.

    ``small``: tiny tensors, otherwise ones that occupy a GPU for microseconds.
    """
    draw = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=draw).to(device)

    # rows, width, outputs; channels and side of an image; heads, tokens and width of a head
    n, width, outputs, channels, side, heads, length, depth = (
        (5, 2, 3, 1, 5, 1, 4, 8) if small else (128, 128, 256, 16, 28, 4, 64, 32)
    )
    x, w, b = normal(n, width), normal(outputs, width), normal(outputs)
    back, shift_back = normal(width, outputs), normal(width)
    image, kernel = normal(1, channels, side, side), normal(channels, channels, 3, 3)
    q, k, v = (normal(1, heads, length, depth) for _ in range(3))
    across = 12 if small else 256
    rows, scale, shift = normal(n, across), normal(across), normal(across)
    many, size = (1, 16) if small else (64, 128)
    head, table, tokens = normal(many, size), normal(65, size), torch.randint(65, (many,), generator=draw).to(device)

    def log_prob():
        return torch_F.linear(head, table).log_softmax(-1).gather(-1, tokens[:, None])

    return {
        "linear": (lambda: F.linear(x, w, b), lambda: torch_F.linear(x, w, b)),
        "mlp": (
            lambda: F.mlp(x, (w, back), (b, shift_back), activation="relu"),
            lambda: torch_F.linear(torch_F.linear(x, w, b).relu_(), back, shift_back),
        ),
        "conv2d": (lambda: F.conv2d(image, kernel), lambda: torch_F.conv2d(image, kernel)),
        "max_pool2d": (lambda: F.max_pool2d(image, 2), lambda: torch_F.max_pool2d(image, 2)),
        "layer_norm": (
            lambda: F.layer_norm(rows, (across,), scale, shift),
            lambda: torch_F.layer_norm(rows, (across,), scale, shift),
        ),
        "embedding": (lambda: F.embedding(tokens, table), lambda: torch_F.embedding(tokens, table)),
        "scaled_dot_product_attention": (
            lambda: F.scaled_dot_product_attention(q, k, v), lambda: torch_F.scaled_dot_product_attention(q, k, v)
        ),
        "linear_cross_entropy": (
            lambda: F.linear_cross_entropy(head, table, tokens),
            lambda: torch_F.cross_entropy(torch_F.linear(head, table), tokens),
        ),
        "linear_log_prob": (lambda: F.linear_log_prob(head, table, tokens), log_prob),
    }  # fmt: skip


@torch.no_grad()
def wrappers(device: str, seconds: float, with_compile: bool, small: bool = False) -> list[ProgramRow]:
    """Rows of one call each, host time. On a CPU the goal is the median of the rounds' own differences.

    Raises:
        Exception: a call of ours failed; whatever it raised.
    """
    rows = []
    on_gpu = device == "cuda"
    clock, least = HostClock(1 if small else 50) if on_gpu else WallClock(), 1 if small else MIN_ROUNDS
    for op, (ours, theirs) in pairs(device, small or not on_gpu).items():
        timings = time_interleaved({OURS: ours, EAGER: theirs}, clock, seconds / 9, least)
        setting = "a small tensor, no gradient, host time" if on_gpu else "a tiny tensor, no gradient"
        pair = {name: ProgramRow(f"call of {op}", setting, name, unit="calls") for name in timings}
        rows += pair.values()
        for name, row in pair.items():
            with noted(row, device):
                row.time_as(timings[name], timings[OURS], 1)
        if on_gpu:
            pair[OURS].targets.append(goals.HOST_US.judged(1e3 * pair[OURS].median_ms))
        elif pair[EAGER].status == OK:
            samples = zip(timings[OURS].samples, timings[EAGER].samples, strict=True)
            extra = quartiles([1e3 * (own - other) for own, other in samples])[1]
            pair[OURS].targets.append(goals.CALL_US.judged(extra))
    return rows
