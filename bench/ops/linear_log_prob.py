"""linear_log_prob: log-probabilities and entropy without logits, against logits in memory and in chunks of rows."""

from primer_fast.bench.op import COMPILED, EAGER, FORWARD, FORWARD_BACKWARD, HOST_GOAL, Floor, OpGoal, declare, named
from primer_fast.bench.ops.linear_cross_entropy import KEPT, PRODUCTS, arrays, kept, products, products_backward
from primer_fast.bench.peers import CHUNKED
from primer_fast.functional.linear_log_prob import linear_log_prob
from primer_fast.reference.linear_log_prob import loss_case, sizes


def _floor(function):
    return lambda *args, return_entropy=False, **named: function(*args, **named)


CPU_CASES = (
    loss_case("policy", "GPT-2's vocabulary, with entropy: 103 MB of logits", 512, 256, 50257, return_entropy=True),
    loss_case("characters", "a small policy: logits that may be in memory", 768, 128, 65, return_entropy=True),
    loss_case("token", "one row: nothing but call overhead", 1, 16, 65),
)


def _many_rows(case):
    return sizes(case)[0] >= 1024


OP = declare(
    "linear_log_prob",
    beside={KEPT: kept(linear_log_prob)},
    floor=Floor(PRODUCTS, _floor(products), _floor(products_backward)),
    cpu_cases=CPU_CASES,
    draw=arrays,
    goals=(  # milliseconds are those of one H100
        OpGoal("median_ms", at_most=15, passes=[FORWARD], precisions=["bfloat16"], where=named("llama")),
        OpGoal("median_ms", at_most=55, passes=[FORWARD_BACKWARD], precisions=["bfloat16"], where=named("llama")),
        OpGoal(f"versus {EAGER}", at_least=1, precisions=["bfloat16"]),
        OpGoal(f"versus {COMPILED}", at_least=1, precisions=["bfloat16"], where=_many_rows),
        OpGoal(f"versus {CHUNKED}", at_least=2, precisions=["bfloat16"], where=_many_rows),
        HOST_GOAL,
    ),
)
