"""Layers with an activation between them: one function against layers one by one, of ours and of PyTorch."""

from primer_fast.bench.op import OURS, declare
from primer_fast.functional.linear import linear
from primer_fast.reference.mlp import case

APART = f"{OURS}, layer by layer"


def apart(input, weights, biases=None, *, activation="gelu", output_activation=None):
    last = len(weights) - 1
    for i, weight in enumerate(weights):
        bias = None if biases is None else biases[i]
        input = linear(input, weight, bias, activation=output_activation if i == last else activation)
    return input


CPU_CASES = (
    case("digits", "the digit MLP", 128, [784, 512, 256, 10], "relu"),
    case("block", "the perceptron of a small transformer, 12 x 64 tokens", 768, [128, 512, 128], "gelu"),
    case("primer", "the primer's own MLP: nothing but call overhead", 5, [2, 3, 4, 3, 1], "sigmoid", "sigmoid"),
)

OP = declare("mlp", beside={APART: apart}, cpu_cases=CPU_CASES)
