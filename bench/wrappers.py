"""What calling our functions costs beside torch.nn.functional on tensors so small that nothing else takes time."""

import torch
import torch.nn.functional as torch_F

from primer_fast import functional as F
from primer_fast.bench import goals
from primer_fast.bench.op import EAGER, OURS
from primer_fast.bench.timing import Timing, WallClock, quartiles, time_interleaved
from primer_fast.bench.trial import Trial
from primer_fast.bench.turns import failure


def pairs(device: str) -> dict[str, tuple]:
    """By op: our call and torch's, without arguments."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=draw).to(device)

    x, w, b = normal(5, 2), normal(3, 2), normal(3)
    image, kernel = normal(1, 1, 5, 5), normal(1, 1, 3, 3)
    q, k, v = normal(1, 1, 4, 8), normal(1, 1, 4, 8), normal(1, 1, 4, 8)
    rows, scale, shift = normal(5, 12), normal(12), normal(12)
    head, table, tokens = normal(1, 16), normal(65, 16), torch.randint(65, (1,), generator=draw).to(device)

    def log_prob():
        return torch_F.linear(head, table).log_softmax(-1).gather(-1, tokens[:, None])

    return {
        "linear": (lambda: F.linear(x, w, b), lambda: torch_F.linear(x, w, b)),
        "conv2d": (lambda: F.conv2d(image, kernel), lambda: torch_F.conv2d(image, kernel)),
        "max_pool2d": (lambda: F.max_pool2d(image, 2), lambda: torch_F.max_pool2d(image, 2)),
        "layer_norm": (
            lambda: F.layer_norm(rows, (12,), scale, shift), lambda: torch_F.layer_norm(rows, (12,), scale, shift)
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
def wrappers(device: str, seconds: float, with_compile: bool) -> list[Trial]:
    """Trials of one call each, host time; the goal is the median of the rounds' own differences.

    Raises:
        Exception: a call of ours failed; whatever it raised.
    """
    trials = []
    for op, (ours, theirs) in pairs(device).items():
        timings = time_interleaved({OURS: ours, EAGER: theirs}, WallClock(), seconds / 8)
        pair = {name: Trial(f"call of {op}", "a tiny tensor, no gradient", name, unit="calls") for name in timings}
        trials += pair.values()
        if not isinstance(timings[OURS], Timing):
            raise timings[OURS]
        if not isinstance(timings[EAGER], Timing):
            pair[EAGER].status, pair[EAGER].reason = failure(timings[EAGER])
            continue
        taken = {name: [ms / 1e3 for ms in timing.samples] for name, timing in timings.items()}
        for name, trial in pair.items():
            trial.time(taken[name], taken[OURS], 1)
        extra = quartiles([1e6 * (own - other) for own, other in zip(taken[OURS], taken[EAGER], strict=True)])[1]
        pair[OURS].targets.append(goals.CALL_US.judged(extra))
    return trials
