"""conv2d + bias + activation: our epilogue against a convolution followed by separate passes, and the bare convolution.

Beside forward and forward + backward, the gradients of input and weight are timed each alone after a forward.
"""

import torch
import torch.nn.functional as torch_F

from primer_fast.bench.op import COMPILED, EAGER, FORWARD, FORWARD_BACKWARD, HOST_GOAL, Floor, OpGoal, declare
from primer_fast.reference import conv2d as reference
from primer_fast.reference.case import Case

BARE = "torch.conv2d"  # on a GPU: cuDNN


def bare(input, weight, bias=None, *, activation=None, **options):
    return torch_F.conv2d(input, weight, None, **options)


def bare_backward(grad, input, weight, bias=None, *, activation=None, stride=1, padding=0, dilation=1, groups=1):
    pairs = [[n, n] if isinstance(n, int) else list(n) for n in (stride, padding, dilation)]
    return torch.ops.aten.convolution_backward(
        grad, input, weight, None, *pairs, False, [0, 0], groups, [True, True, False]
    )[:2]


def flops(case):
    """As the reference; each of the two gradients is half of the backward."""
    by_pass = reference.flops(case)
    return {**by_pass, "input": by_pass["backward"] / 2, "weight": by_pass["backward"] / 2}


def traffic(case, itemsize):
    """As the reference; the gradient of one array reads dy, what the forward saved, and the other array."""
    by_pass = reference.bytes_moved(case, itemsize)
    N, _, O, P, Q, *_ = reference.sizes(case)
    read = N * O * P * Q * (1 + (case.options.get("activation") is not None))
    both = sum(torch.Size(case.shapes[name]).numel() for name in ("input", "weight"))
    return {**by_pass, "input": itemsize * (read + both), "weight": itemsize * (read + both)}


def _case(name, why, input, weight, options, activation="relu", layouts=None):
    options = {**options, "activation": activation}
    return Case(name, why, {"input": input, "weight": weight, "bias": weight[:1]}, options, layouts or {})


_LAST = {"input": "channels_last", "weight": "channels_last"}
CPU_CASES = (
    _case("digits_first", "the digit CNN's first layer", (128, 1, 28, 28), (32, 1, 3, 3), {"padding": 1}),
    _case("digits_second", "the digit CNN's second layer", (128, 32, 14, 14), (64, 32, 3, 3), {"padding": 1}),
    _case("resnet_3x3", "a 3 x 3 layer of ResNet-50, one image", (1, 64, 56, 56), (64, 64, 3, 3), {"padding": 1},
          layouts=_LAST),
    _case("primer", "the primer's 5 x 5 image: nothing but call overhead", (1, 1, 5, 5), (1, 1, 3, 3), {}),
)  # fmt: skip


def _resnet(case):
    return case.name.startswith("resnet_")


OP = declare(
    "conv2d",
    floor=Floor(BARE, bare, bare_backward),
    cpu_cases=CPU_CASES,
    flops=flops,
    bytes_moved=traffic,
    parts=("input", "weight"),
    goals=(
        OpGoal(f"versus {EAGER}", at_least=1, passes=[FORWARD], precisions=["bfloat16"], where=_resnet),
        OpGoal(f"versus {COMPILED}", at_least=1, passes=[FORWARD], precisions=["bfloat16"], where=_resnet),
        OpGoal(f"versus {EAGER}", at_least=0.9, passes=[FORWARD_BACKWARD], precisions=["bfloat16"], where=_resnet),
        HOST_GOAL,
    ),
)
