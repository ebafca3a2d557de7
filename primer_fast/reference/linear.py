"""Linear layer with bias and activation: y = activation(input weight^T + bias).

Legend: M rows (all leading axes of input together), K in features, N out features.
"""

__all__ = ["CASES", "REFERENCE", "bytes_moved", "flops", "linear", "linear_grad", "linear_magnitude", "sizes"]

import math

import numpy as np

from primer_fast.reference.activation import activate, derivative
from primer_fast.reference.case import Case, Reference


def _rows(a):
    return a.reshape(-1, a.shape[-1]) if a.size else a.reshape(math.prod(a.shape[:-1]), a.shape[-1])


def linear(input, weight, bias=None, *, activation=None):
    """input (..., K), weight (N, K), bias (N,) -> (..., N)."""
    z = input @ weight.T
    return activate(z if bias is None else z + bias, activation)


def linear_grad(dy, input, weight, bias=None, *, activation=None):
    """dy (..., N) and the forward's arguments -> gradient of each array argument by name."""
    g = dy * derivative(linear(input, weight, bias), activation)
    grads = {"input": g @ weight, "weight": _rows(g).T @ _rows(input)}
    return grads if bias is None else {**grads, "bias": _rows(g).sum(axis=0)}


def linear_magnitude(dy, input, weight, bias=None, *, activation=None):
    """Largest sum of absolute products behind each result by name: what a float32 sum's rounding is relative to."""
    arrays = (np.abs(a) for a in (input, weight, bias) if a is not None)
    sums = {"output": linear(*arrays), **linear_grad(*(np.abs(a) for a in (dy, input, weight, bias) if a is not None))}
    return {name: float(a.max(initial=0.0)) for name, a in sums.items()}


def sizes(case):
    """Case -> (M, K, N)."""
    *lead, K = case.shapes["input"]
    return math.prod(lead), K, case.shapes["weight"][0]


def flops(case):
    """Floating-point operations by pass, a multiply-add counted as two; the backward is two products."""
    M, K, N = sizes(case)
    return {"forward": 2 * M * K * N, "backward": 4 * M * K * N}


def bytes_moved(case, itemsize):
    """Fewest bytes to move by pass: every array read once, every result written once.

    The backward reads dy, input, weight and, with an activation, the saved (M, N) tensor.
    """
    M, K, N = sizes(case)
    bias, saved = N * ("bias" in case.shapes), M * N * (case.options.get("activation") is not None)
    operands = M * K + N * K + bias
    return {
        "forward": itemsize * (operands + M * N),
        "backward": itemsize * (M * N + saved + M * K + N * K + operands),
    }


def _case(name, why, M, K, N, activation=None, *, bias=True, layouts=None, production=False):
    lead = M if isinstance(M, tuple) else (M,)
    shapes = {"input": (*lead, K), "weight": (N, K)} | ({"bias": (N,)} if bias else {})
    return Case(name, why, shapes, {"activation": activation}, layouts or {}, production)


CASES = (
    _case("primer_first", "the primer's [2, 3, 4, 3, 1]: K = 2", 5, 2, 3, "sigmoid"),
    _case("primer_last", "the primer's [2, 3, 4, 3, 1]: N = 1", 5, 3, 1, "sigmoid"),
    _case("one", "every size 1", 1, 1, 1, "tanh"),
    _case("one_row", "M = 1, decoding", 1, 200, 72, "gelu"),
    _case("exact_tile", "sizes that tiles divide", 64, 64, 64, "relu"),
    _case("below_tile", "one short of a tile, odd strides: no descriptors", 63, 65, 127, "gelu"),
    _case("above_tile", "one past a tile, odd strides", 65, 33, 129, "silu"),
    _case("edges_aligned", "edges inside tiles, strides that descriptors take", 72, 40, 136, "gelu"),
    _case("many_tiles", "several tiles each way: grouped order and its last, short group", 600, 32, 136, "leaky_relu"),
    _case("long_reduction", "few tiles, long K: the reduction is split", 16, 1500, 24, "gelu_tanh"),
    _case("tall", "long M, so dweight and dbias split their reduction", 900, 8, 16, "tanh"),
    _case("no_bias", "no bias, no activation: a plain product", 48, 80, 56, bias=False),
    _case("no_activation", "bias alone", 48, 80, 56),
    _case("leading_axes", "three axes of rows", (2, 3, 5), 40, 24, "relu"),
    _case("vector", "1-D input: no row axis", (), 24, 40, "sigmoid"),
    _case("no_rows", "empty batch", 0, 16, 24, "gelu"),
    _case("no_features", "K = 0: the output is activation(bias)", 3, 0, 8, "gelu"),
    _case("no_features_vector", "K = 0 without a row axis", (), 0, 8, "silu"),
    _case("large_values", "pre-activations far from 0, where differences of activations cancel", (2, 7), 900, 8,
          "gelu_tanh"),
    _case("weight_transposed", "weight stored (K, N)", 40, 64, 48, "gelu", layouts={"weight": "transposed"}),
    _case("input_transposed", "input stored (K, M)", 64, 72, 48, "relu", layouts={"input": "transposed"}),
    _case("input_strided", "every second element", 33, 40, 48, "silu", layouts={"input": "strided"}),
    _case("input_expanded", "one row repeated by stride 0", 33, 40, 48, "silu", layouts={"input": "expanded"}),
    _case("offset", "arrays that start off a 16-byte boundary", 40, 64, 48, "tanh",
          layouts={"input": "offset", "weight": "offset", "bias": "offset"}),
    _case("square_4096", "the common size of published figures", 4096, 4096, 4096, "gelu", production=True),
    _case("square_8192", "large: the share of the chip's peak", 8192, 8192, 8192, "gelu", production=True),
    _case("square_1024", "fewer tiles than multiprocessors", 1024, 1024, 1024, "gelu", production=True),
    _case("square_512", "launch-bound", 512, 512, 512, "gelu", production=True),
    _case("gpt2_up", "GPT-2 124M, up projection, 16 x 1024 tokens", 16384, 768, 3072, "gelu_tanh", production=True),
    _case("gpt2_down", "GPT-2 124M, down projection", 16384, 3072, 768, production=True),
    _case("gpt2_qkv", "GPT-2 124M, no activation, three outputs", 16384, 768, 2304, production=True),
    _case("llama_gate", "7B-sized gate projection", 4096, 4096, 11008, "silu", bias=False, production=True),
    _case("mnist_hidden", "the digit MLP's first layer", 128, 784, 512, "relu", production=True),
    _case("decode", "one token through a 4096-wide layer: bound by the weight's bytes", 1, 4096, 4096, "silu",
          production=True),
    _case("odd", "strides that no descriptor takes", 4095, 4095, 4095, "gelu", production=True),
)  # fmt: skip

REFERENCE = Reference("linear", linear, linear_grad, linear_magnitude, flops, bytes_moved, CASES)
