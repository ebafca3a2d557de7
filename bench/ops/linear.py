"""linear + bias + activation: our epilogue against a product followed by separate passes, and the bare product."""

import math

import torch

from primer_fast.bench.op import COMPILED, EAGER, FORWARD, FORWARD_BACKWARD, HOST_GOAL, Floor, OpGoal, declare
from primer_fast.reference.case import Case
from primer_fast.reference.linear import sizes

PRODUCT = "torch.mm"  # on a GPU: cuBLAS


def product(input, weight, bias=None, *, activation=None):
    return torch.mm(input, weight.t())


def product_backward(grad, input, weight, bias=None, *, activation=None):
    return torch.mm(grad, weight), torch.mm(grad.t(), input)


def _case(name, why, M, K, N, activation):
    return Case(name, why, {"input": (M, K), "weight": (N, K), "bias": (N,)}, {"activation": activation})


CPU_CASES = (
    _case("digits", "the digit MLP's first layer", 128, 784, 512, "relu"),
    _case("block_up", "up projection of a small transformer, 12 x 64 tokens", 768, 128, 512, "gelu"),
    _case("square_512", "bound by the product", 512, 512, 512, "gelu"),
    _case("primer", "the primer's own MLP: nothing but call overhead", 5, 2, 3, "sigmoid"),
)


def _at_least(size):
    return lambda case: min(sizes(case)) >= size


def _sums(shortest, longest=math.inf):
    """Cases whose products sum over so many elements."""
    return lambda case: shortest <= sizes(case)[1] <= longest


OP = declare(
    "linear",
    floor=Floor(PRODUCT, product, product_backward),
    cpu_cases=CPU_CASES,
    goals=(
        OpGoal(f"versus {EAGER}", at_least=1, passes=[FORWARD], precisions=["bfloat16"], where=_at_least(512)),
        OpGoal(f"versus {COMPILED}", at_least=1, passes=[FORWARD], precisions=["bfloat16"], where=_at_least(512)),
        OpGoal(f"versus {PRODUCT}", at_least=0.97, passes=[FORWARD], precisions=["bfloat16"], where=_at_least(4096)),
        *(  # the longer the sums, the smaller the part of the time that fusion saves
            OpGoal(f"versus {COMPILED}", at_least=gain, passes=[FORWARD_BACKWARD], precisions=["bfloat16"], where=where)
            for gain, where in ((1.1, _sums(1, 2048)), (1.05, _sums(2049, 8191)), (1, _sums(8192)))
        ),
        OpGoal(f"versus {PRODUCT}", at_least=2, passes=[FORWARD], precisions=["float32"], where=_at_least(512)),
        HOST_GOAL,
    ),
)
