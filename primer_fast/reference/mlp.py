"""Multilayer perceptron: h_0 = input, h_i = act(h_{i-1} weights[i-1]^T + biases[i-1]), i = 1..L.

The last layer has an activation of its own. Legend: M rows (all leading axes of input together), n_i width of layer i.
"""

__all__ = ["CASES", "REFERENCE", "bytes_moved", "case", "flops", "mlp", "mlp_grad", "mlp_magnitude", "sizes", "values"]

import math

import numpy as np

from primer_fast.reference.activation import activate, derivative
from primer_fast.reference.case import Case, Reference, arguments


def _rows(a):
    return a.reshape(math.prod(a.shape[:-1]), a.shape[-1])


def _layers(input, weights, biases, activation, output_activation):
    """The input of each layer, what its activation is applied to, and the activation."""
    h, found = input, []
    for i, w in enumerate(weights):
        z = h @ w.T
        if biases is not None and biases[i] is not None:
            z = z + biases[i]
        act = output_activation if i == len(weights) - 1 else activation
        found.append((h, z, act))
        h = activate(z, act)
    return found


def mlp(input, weights, biases=None, *, activation="gelu", output_activation=None):
    """input (..., n_0), weights (n_i, n_{i-1}), biases (n_i,) or None -> (..., n_L)."""
    _, z, act = _layers(input, weights, biases, activation, output_activation)[-1]
    return activate(z, act)


def mlp_grad(dy, input, weights, biases=None, *, activation="gelu", output_activation=None):
    """dy (..., n_L) and the forward's arguments -> gradient of each array by the name that a case gives it."""
    layers, g, grads = _layers(input, weights, biases, activation, output_activation), dy, {}
    for i in reversed(range(len(weights))):
        h, z, act = layers[i]
        dz = g * derivative(z, act)
        grads[f"weights.{i}"] = _rows(dz).T @ _rows(h)
        if biases is not None and biases[i] is not None:
            grads[f"biases.{i}"] = _rows(dz).sum(axis=0)
        g = dz @ weights[i]
    return {"input": g, **grads}


def mlp_magnitude(dy, input, weights, biases=None, *, activation="gelu", output_activation=None):
    """Largest sum of absolute products behind each result by name: what a float32 sum's rounding is relative to."""
    arrays = {"input": np.abs(input), "weights": [np.abs(w) for w in weights]}
    arrays["biases"] = [None if b is None else np.abs(b) for b in biases or [None] * len(weights)]
    sums = {"output": mlp(**arrays, activation=None), **mlp_grad(np.abs(dy), **arrays, activation=None)}
    return {name: float(a.max(initial=0.0)) for name, a in sums.items()}


def values(case, rng):
    """Weights of variance 1 / n_{i-1}, as when initialised; a production case's are drawn where they are used."""
    if case.production:
        return {}
    weights = {name: shape for name, shape in case.shapes.items() if name.startswith("weights")}
    return {name: rng.normal(size=shape) / max(shape[1], 1) ** 0.5 for name, shape in weights.items()}


def sizes(case):
    """Case -> M, [n_0, ..., n_L]."""
    *lead, width = case.shapes["input"]
    return math.prod(lead), [width, *(shape[0] for name, shape in case.shapes.items() if name.startswith("weights"))]


def flops(case):
    """Floating-point operations by pass, a multiply-add counted as two; the backward has two products for each one."""
    M, widths = sizes(case)
    forward = sum(2 * M * widths[i] * widths[i + 1] for i in range(len(widths) - 1))
    return {"forward": forward, "backward": 2 * forward}


def bytes_moved(case, itemsize):
    """Fewest bytes to move by pass: every array read once, every result written once, and each hidden layer's tensors.

    Their output and, with an activation, the tensor that gives the derivative are written by the forward and read by
    the backward; its gradient is written and read, too.
    """
    M, widths = sizes(case)
    given = arguments(case.shapes)
    parameters = sum(math.prod(shape) for name, shape in case.shapes.items() if name != "input")
    hidden, kept = M * sum(widths[1:-1]), case.options.get("activation", "gelu") is not None
    saved = hidden * kept + M * widths[-1] * (case.options.get("output_activation") is not None)
    biases = sum(math.prod(shape) for shape in given.get("biases", []) if shape is not None)
    return {
        "forward": itemsize * (M * widths[0] + parameters + 2 * hidden + M * widths[-1]),
        "backward": itemsize * (M * widths[-1] + saved + 3 * hidden + 2 * M * widths[0] + 2 * parameters - biases),
    }


def case(name, why, M, widths, activation="gelu", output_activation=None, *, biased=None, layouts=None,
          production=False):  # fmt: skip
    """biased: which layers have a bias; None: all."""
    lead = M if isinstance(M, tuple) else (M,)
    shapes = {"input": (*lead, widths[0])}
    for i, n in enumerate(widths[1:]):
        shapes |= {f"weights.{i}": (n, widths[i])}
        shapes |= {f"biases.{i}": (n,)} if biased is None or i in biased else {}
    options = {"activation": activation, "output_activation": output_activation}
    return Case(name, why, shapes, options, layouts or {}, production)


CASES = (
    case("primer", "the primer's [2, 3, 4, 3, 1]", 5, [2, 3, 4, 3, 1], "sigmoid", "sigmoid"),
    case("one_layer", "a linear layer with an activation", 24, [40, 16], "relu", "gelu"),
    case("one_product", "a linear layer and nothing else", 24, [40, 16]),
    case("gelu", "two layers, as in a transformer", 72, [40, 136, 40], "gelu"),
    case("gelu_tanh", "as in GPT-2", 64, [32, 128, 32], "gelu_tanh"),
    case("relu", "the derivative from the output", 40, [48, 64, 24], "relu"),
    case("leaky_relu", "the same, another factor", 40, [48, 64, 24], "leaky_relu"),
    case("silu", "as in LLaMA", 40, [48, 64, 24], "silu", biased=()),
    case("linear_inside", "no activation at all: no derivative", 24, [16, 24, 32], None),
    case("edges_four", "edges inside tiles, strides that descriptors take; four widths", 72, [40, 136, 24, 72], "gelu"),
    case("below_tile", "odd strides: no descriptors", 63, [65, 127, 33], "gelu"),
    case("three_layers", "a derivative below a derivative", 33, [24, 40, 56, 8], "tanh"),
    case("output", "the last layer's derivative is made in a pass", 48, [32, 64, 40], "silu", "gelu"),
    case("output_from_y", "the same from the output", 48, [32, 64, 40], "gelu", "sigmoid"),
    case("output_odd", "the same, rows that start anywhere", 37, [9, 31, 7], "relu", "tanh"),
    case("last_bias_alone", "a layer without a bias before one with", 20, [16, 32, 24], "gelu", biased=(1,)),
    case("tall", "long M, so each dweight splits its reduction", 900, [8, 16, 8], "gelu"),
    case("long_reduction", "few tiles, long sums: both directions split", 16, [1200, 24, 1200], "gelu_tanh"),
    case("leading_axes", "three axes of rows", (2, 3, 5), [40, 24, 16], "relu"),
    case("vector", "1-D input: no row axis", (), [24, 40, 8], "sigmoid"),
    case("no_rows", "empty batch", 0, [16, 24, 8], "gelu", "relu"),
    case("no_features", "n_0 = 0: the first layer is its bias", 3, [0, 8, 5], "gelu"),
    case("no_hidden", "a hidden layer of width 0", 3, [5, 0, 4], "silu"),
    case("weights_transposed", "weights stored (n_{i-1}, n_i)", 40, [64, 48, 32], "gelu",
          layouts={"weights.0": "transposed", "weights.1": "transposed"}),
    case("strided", "every second element", 33, [40, 48, 24], "silu",
          layouts={"input": "strided", "weights.1": "strided", "biases.0": "strided"}),
    case("expanded", "one row repeated by stride 0", 33, [40, 48, 24], "gelu", layouts={"input": "expanded"}),
    case("offset", "arrays that start off a 16-byte boundary", 40, [64, 48, 32], "tanh",
          layouts={"input": "offset", "weights.0": "offset", "biases.1": "offset"}),
    case("gpt2", "GPT-2 124M, 16 x 1024 tokens", 16384, [768, 3072, 768], "gelu_tanh", production=True),
    case("llama", "7B-sized, without its gate", 4096, [4096, 11008, 4096], "silu", biased=(), production=True),
    case("digits", "the digit MLP", 128, [784, 512, 256, 10], "relu", production=True),
    case("odd", "strides that no descriptor takes", 4095, [1023, 4095, 1023], "gelu", production=True),
)  # fmt: skip

REFERENCE = Reference("mlp", mlp, mlp_grad, mlp_magnitude, flops, bytes_moved, CASES, values=values)
