"""Log-probability of a target class under the softmax of a linear layer, and the entropy of that softmax.

Legend: N rows (all leading axes of input together), D features, V classes (the vocabulary).
"""

__all__ = [
    "CASES",
    "LOGITS",
    "REFERENCE",
    "bytes_moved",
    "counting",
    "flops",
    "linear_grads",
    "linear_log_prob",
    "linear_log_prob_grad",
    "linear_log_prob_magnitude",
    "log_softmax",
    "logits_of",
    "loss_case",
    "one_hot",
    "sizes",
    "values",
]

import math

import numpy as np

from primer_fast.reference.case import Case, Reference

IGNORED = -100  # torch's default of ignore_index
LOGITS = {"flat": (0.0, 1.0), "peaked": (0.0, 20.0), "all_negative": (-80.0, 1.0), "large": (300.0, 1.0)}  # mean, std


def logits_of(input, linear_weight, linear_bias, temperature=1.0):
    z = input @ linear_weight.T
    return (z if linear_bias is None else z + linear_bias) / temperature


def log_softmax(z):
    """The same, row by row; a row of nothing but -inf is NaN, as is one with NaN or +inf."""
    with np.errstate(invalid="ignore", divide="ignore"):
        shifted = z - z.max(axis=-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def one_hot(target, classes):
    """(...) -> (..., classes); a target outside [0, classes) has no 1."""
    return (target[..., None] == np.arange(classes)).astype(float)


def linear_grads(g, input, linear_weight, linear_bias):
    """Gradient at the products input linear_weight^T + linear_bias -> that of each array by name."""
    rows, flat = g.reshape(-1, g.shape[-1]), input.reshape(math.prod(input.shape[:-1]), input.shape[-1])
    grads = {"input": g @ linear_weight, "linear_weight": rows.T @ flat}
    return grads if linear_bias is None else {**grads, "linear_bias": rows.sum(axis=0)}


def counting(target, ignore_index):
    """(...) -> which rows are not ignored (...)."""
    return target != (IGNORED if ignore_index is None else ignore_index)


def linear_log_prob(
    input, linear_weight, target, *, linear_bias=None, temperature=1.0, return_entropy=False, ignore_index=IGNORED
):
    """input (..., D), linear_weight (V, D), target (...) -> log p(target) (...), and the entropy (...) if asked for."""
    log_p = log_softmax(logits_of(input, linear_weight, linear_bias, temperature))
    counts = counting(target, ignore_index)
    chosen = np.where(counts, (log_p * one_hot(target, linear_weight.shape[0])).sum(axis=-1), 0.0)
    return (chosen, np.where(counts, -(np.exp(log_p) * log_p).sum(axis=-1), 0.0)) if return_entropy else chosen


def _logit_gradient(upstream, log_p, target, temperature, ignore_index, sign=-1.0):
    """sign 1.0: the sum of the absolute terms instead."""
    dy, dh = upstream if isinstance(upstream, tuple) else (upstream, np.zeros(target.shape))
    dy, dh = (np.where(counting(target, ignore_index), d, 0.0) for d in (dy, dh))
    p, entropy = np.exp(log_p), -(np.exp(log_p) * log_p).sum(axis=-1, keepdims=True)
    about = np.abs(log_p) + entropy if sign > 0 else log_p + entropy
    g = dy[..., None] * (one_hot(target, log_p.shape[-1]) + sign * p) + sign * dh[..., None] * p * about
    return g / temperature


def linear_log_prob_grad(
    upstream, input, linear_weight, target, *, linear_bias=None, temperature=1.0, return_entropy=False,
    ignore_index=IGNORED,
):  # fmt: skip
    """upstream (...), or one for each output, and the forward's arguments -> gradient of each float array by name.

    d log p(t) / d z_v = [v = t] - p_v,    d H / d z_v = -p_v (log p_v + H),    z the logits over the temperature.
    """
    log_p = log_softmax(logits_of(input, linear_weight, linear_bias, temperature))
    g = _logit_gradient(upstream, log_p, target, temperature, ignore_index)
    return linear_grads(g, input, linear_weight, linear_bias)


def linear_log_prob_magnitude(
    upstream, input, linear_weight, target, *, linear_bias=None, temperature=1.0, return_entropy=False,
    ignore_index=IGNORED,
):  # fmt: skip
    """Largest sum of absolute terms behind each result by name."""
    log_p = log_softmax(logits_of(input, linear_weight, linear_bias, temperature))
    x, weight, bias = (None if a is None else np.abs(a) for a in (input, linear_weight, linear_bias))
    behind = float(logits_of(x, weight, bias, temperature).max(initial=0.0))
    upstream = tuple(map(np.abs, upstream)) if isinstance(upstream, tuple) else np.abs(upstream)
    grads = linear_grads(_logit_gradient(upstream, log_p, target, temperature, ignore_index, sign=1.0), x, weight, bias)
    return {"output": behind, "entropy": behind} | {name: float(a.max(initial=0.0)) for name, a in grads.items()}


def values(case, rng):
    """Targets in the vocabulary, and weights that make the logits what the case's name says: see LOGITS.

    A case with an ``ignore_index`` ignores a third of its rows, "all_ignored" all of them.
    """
    shapes = case.shapes
    mean, std = LOGITS.get(case.name, LOGITS["flat"])
    scale = std / max(shapes["input"][-1], 1) ** 0.5
    arrays = {
        "linear_weight": rng.normal(size=shapes["linear_weight"]) * scale,
        "target": rng.integers(shapes["linear_weight"][0], size=shapes["target"]),
    }
    if "linear_bias" in shapes:
        arrays["linear_bias"] = rng.normal(mean, 1.0, size=shapes["linear_bias"])
    if "ignore_index" in case.options:
        ignored = IGNORED if case.options["ignore_index"] is None else case.options["ignore_index"]
        drop = rng.random(size=shapes["target"]) < (1.0 if case.name == "all_ignored" else 1 / 3)
        arrays["target"] = np.where(drop, ignored, arrays["target"])
    return arrays


def sizes(case):
    """Case -> (N, D, V)."""
    *lead, D = case.shapes["input"]
    return math.prod(lead), D, case.shapes["linear_weight"][0]


def flops(case):
    """Floating-point operations by pass, a multiply-add counted as two; the backward is two products.

    It computes the logits once more; that is this implementation's choice, so it is not counted.
    """
    N, D, V = sizes(case)
    return {"forward": 2 * N * D * V, "backward": 4 * N * D * V}


def bytes_moved(case, itemsize):
    """Fewest bytes to move by pass: every array read once, every result written once, the logits never."""
    N, D, V = sizes(case)
    outputs = 4 * N * (1 + bool(case.options.get("return_entropy")))
    operands = itemsize * (N * D + V * D + V * ("linear_bias" in case.shapes)) + 8 * N
    return {"forward": operands + outputs, "backward": 2 * operands - 8 * N + outputs}


def loss_case(name, why, rows, D, V, *, bias=False, layouts=None, production=False, **options):
    """A case of a loss head; rows is their number or the leading axes."""
    lead = rows if isinstance(rows, tuple) else (rows,)
    shapes = {"input": (*lead, D), "linear_weight": (V, D), "target": lead} | ({"linear_bias": (V,)} if bias else {})
    return Case(name, why, shapes, options, layouts or {}, production, {"target": "int64"})


CASES = (
    loss_case("characters", "65 classes, as many as tinyshakespeare has characters", 40, 24, 65),
    loss_case("entropy", "an upstream gradient of its own for each row of both outputs", 17, 40, 300,
              return_entropy=True),
    loss_case("temperature", "logits over a temperature, bias inside", 20, 32, 200, bias=True, temperature=0.7,
              return_entropy=True),
    loss_case("splits", "few rows, many classes: several programs share a row", 9, 16, 1000, return_entropy=True),
    loss_case("padding", "padding has log-probability, entropy and gradients 0", 30, 24, 65, bias=True,
              return_entropy=True, ignore_index=None),
    loss_case("class_as_padding", "a class of the vocabulary is ignored; its logit still counts", 30, 24, 65,
              ignore_index=3),
    loss_case("peaked", "one class has all the probability", 24, 40, 130, return_entropy=True),
    loss_case("all_negative", "no logit near 0, which is what stands outside the vocabulary", 24, 40, 130, bias=True,
              return_entropy=True),
    loss_case("large", "logits of some hundreds, whose exponentials overflow", 12, 40, 130, bias=True),
    loss_case("one", "every size 1: log p = 0", 1, 1, 1, bias=True, return_entropy=True),
    loss_case("odd", "features that nothing divides: rows off 16-byte boundaries", 21, 37, 99, bias=True),
    loss_case("leading_axes", "batch and time", (2, 3, 5), 24, 65),
    loss_case("vector", "1-D input: no row axis", (), 24, 65, return_entropy=True),
    loss_case("no_rows", "empty batch", 0, 16, 24, return_entropy=True),
    loss_case("no_features", "D = 0: the logits are the bias", 3, 0, 8, bias=True),
    loss_case("transposed", "weight stored (D, V), input stored (D, N)", 40, 48, 80,
              layouts={"linear_weight": "transposed", "input": "transposed"}),
    loss_case("strided", "every second element", 24, 32, 70, layouts={"input": "strided", "linear_weight": "strided"}),
    loss_case("offset", "arrays that start off a 16-byte boundary", 24, 32, 72, bias=True,
              layouts={"input": "offset", "linear_weight": "offset", "linear_bias": "offset"}),
    loss_case("llama", "128k classes with entropy: the size of published figures", 8192, 4096, 131072,
              return_entropy=True, production=True),
    loss_case("qwen", "policy and reference of an 8B model", 8192, 4096, 151936, production=True),
    loss_case("gpt2", "GPT-2 124M, 16 x 1024 tokens", 16384, 768, 50257, return_entropy=True, production=True),
    loss_case("decode", "one token: bound by the weight's bytes", 1, 4096, 131072, production=True),
)  # fmt: skip

REFERENCE = Reference(
    "linear_log_prob",
    linear_log_prob,
    linear_log_prob_grad,
    linear_log_prob_magnitude,
    flops,
    bytes_moved,
    CASES,
    values=values,
    outputs=("output", "entropy"),
)
