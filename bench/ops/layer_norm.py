"""layer_norm of a residual sum: one pass against an addition followed by a layer norm."""

from primer_fast.bench.op import COMPILED, EAGER, FORWARD, FORWARD_BACKWARD, HOST_GOAL, OpGoal, declare
from primer_fast.reference.case import Case
from primer_fast.reference.layer_norm import bytes_moved, sizes


def _case(name, why, shape, **options):
    N = shape[-1]
    shapes = {"input": shape, "weight": (N,), "bias": (N,)}
    return Case(name, why, shapes | ({"residual": shape} if options else {}), {"normalized_shape": N, **options})


CPU_CASES = (
    _case("block", "a block of a small transformer, 12 x 64 tokens", (768, 128), return_residual=True),
    _case("width_768", "GPT-2's width", (1024, 768)),
    _case("primer", "a few tokens: nothing but call overhead", (5, 12), return_residual=True),
)


def _fills_the_chip(case):
    return bytes_moved(case, 2)["forward"] > 2**25


def _held(case):
    """Rows that a program of the backward holds: longer ones are read twice."""
    return _fills_the_chip(case) and sizes(case)[1] <= 8192


OP = declare(
    "layer_norm",
    cpu_cases=CPU_CASES,
    goals=(
        OpGoal("share", at_least=0.9, passes=[FORWARD], where=_fills_the_chip),
        OpGoal("share", at_least=0.8, passes=[FORWARD_BACKWARD], where=_held),
        OpGoal(f"versus {EAGER}", at_least=1),
        OpGoal(f"versus {COMPILED}", at_least=1, where=_fills_the_chip),
        HOST_GOAL,
    ),
)
