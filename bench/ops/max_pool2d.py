"""max_pool2d: a byte per output and a gather against PyTorch's int64 indices and scatter."""

from primer_fast.bench.op import EAGER, FORWARD, FORWARD_BACKWARD, HOST_GOAL, OpGoal, declare
from primer_fast.reference.case import Case
from primer_fast.reference.max_pool2d import bytes_moved


def _case(name, why, shape, **options):
    return Case(name, why, {"input": shape}, options)


CPU_CASES = (
    _case("digits", "a digit CNN's first pool", (128, 8, 28, 28), kernel_size=2),
    _case("stem", "ResNet's pool, one image", (1, 64, 112, 112), kernel_size=3, stride=2, padding=1),
    _case("primer", "one small image: nothing but call overhead", (1, 1, 4, 4), kernel_size=2),
)


def _fills_the_chip(case):
    return bytes_moved(case, 2)["forward"] > 2**25


OP = declare(
    "max_pool2d",
    cpu_cases=CPU_CASES,
    goals=(
        OpGoal("share", at_least=0.85, where=_fills_the_chip),
        OpGoal(f"versus {EAGER}", at_least=1, passes=[FORWARD]),
        OpGoal(f"versus {EAGER}", at_least=2, passes=[FORWARD_BACKWARD], where=_fills_the_chip),
        HOST_GOAL,
    ),
)
