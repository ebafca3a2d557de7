"""linear_cross_entropy: logits never in memory against logits in memory, in chunks, and other projects' kernels."""

import torch

from primer_fast.bench.op import COMPILED, EAGER, FORWARD_BACKWARD, HOST_GOAL, OURS, Floor, OpGoal, declare, named
from primer_fast.bench.peers import CCE, LIGER, on_cuda
from primer_fast.functional.linear_cross_entropy import linear_cross_entropy
from primer_fast.reference.linear_cross_entropy import CASES, sizes
from primer_fast.reference.linear_log_prob import loss_case

PRODUCTS = "torch.mm"
KEPT = f"{OURS}, keep_logits"


def kept(function):
    """The function with the logits kept, which it does on a GPU alone."""

    def call(input, *args, **named):
        on_cuda(input, KEPT)
        return function(input, *args, keep_logits=True, **named)

    return call


def products(input, linear_weight, target):
    """The logits alone, row block by row block: memory for all of them would not always be there."""
    for rows in input.split(8192):
        last = rows @ linear_weight.t()
    return last


def products_backward(grad, input, linear_weight, target):
    for rows in input.split(8192):
        g = grad[: len(rows)]
        dx, dw = g @ linear_weight, g.t() @ rows
    return dx, dw


def arrays(op, case, dtype, device, generator):
    """Normal rows, a weight of variance 1 / D so that logits have variance 1, and uniform targets."""
    N, D, V = sizes(case)
    return {
        "input": torch.randn(N, D, generator=generator, device=device).to(dtype),
        "linear_weight": torch.randn(V, D, generator=generator, device=device).div_(D**0.5).to(dtype),
        "target": torch.randint(V, (N,), generator=generator, device=device),
    }


CPU_CASES = (
    loss_case("gpt2", "GPT-2's vocabulary: 206 MB of logits", 1024, 256, 50257),
    loss_case("characters", "nanoGPT's CPU setting, 12 x 64 tokens", 768, 128, 65),
    loss_case("token", "one row: nothing but call overhead", 1, 16, 65),
)


def _large(case):
    return sizes(case)[2] > 1000


OP = declare(
    "linear_cross_entropy",
    beside={KEPT: kept(linear_cross_entropy)},
    floor=Floor(PRODUCTS, products, products_backward),
    gpu_cases=[case for case in CASES if case.production and not case.options],  # what every provider takes
    cpu_cases=CPU_CASES,
    draw=arrays,
    goals=(  # milliseconds and memory are those of one H100
        OpGoal("median_ms", at_most=60, passes=[FORWARD_BACKWARD], precisions=["bfloat16"], where=named("qwen")),
        OpGoal("peak_mib", at_most=6144, passes=[FORWARD_BACKWARD], precisions=["bfloat16"], where=named("qwen")),
        OpGoal(f"versus {EAGER}", at_least=1, precisions=["bfloat16"]),
        OpGoal(f"versus {COMPILED}", at_least=1, precisions=["bfloat16"], where=_large),
        OpGoal(f"versus {LIGER}", at_least=2, passes=[FORWARD_BACKWARD], precisions=["bfloat16"], where=_large),
        OpGoal(f"versus {CCE}", at_least=1, precisions=["bfloat16"], where=_large),
        HOST_GOAL,
    ),
)
