"""embedding of tokens and positions: one pass, and a backward by sorted runs, against two gathers and a scatter."""

from primer_fast.bench.op import COMPILED, EAGER, HOST_GOAL, OpGoal, declare
from primer_fast.reference.case import Case


def _case(name, why, shape, V, D):
    shapes = {"input": shape, "weight": (V, D), "position": (shape[-1], D)}
    return Case(name, why, shapes, dtypes={"input": "int64"})


CPU_CASES = (
    _case("block", "a small transformer of characters, 12 x 64 tokens", (12, 64), 65, 128),
    _case("gpt2", "GPT-2's tables, 1024 tokens", (1, 1024), 50257, 768),
    _case("primer", "a few tokens: nothing but call overhead", (1, 5), 12, 8),
)

OP = declare(
    "embedding",
    cpu_cases=CPU_CASES,
    goals=(OpGoal(f"versus {EAGER}", at_least=1), OpGoal(f"versus {COMPILED}", at_least=1), HOST_GOAL),
)
