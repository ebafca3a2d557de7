"""Cross entropy of the logits of a linear layer.

Legend: N rows (all leading axes of input together), D features, V classes (the vocabulary).
"""

__all__ = [
    "CASES",
    "IGNORED",
    "REFERENCE",
    "bytes_moved",
    "flops",
    "linear_cross_entropy",
    "linear_cross_entropy_grad",
    "linear_cross_entropy_magnitude",
    "values",
]

import numpy as np

from primer_fast.reference import linear_log_prob as head
from primer_fast.reference.case import Reference
from primer_fast.reference.linear_log_prob import (
    IGNORED,
    counting,
    linear_grads,
    log_softmax,
    logits_of,
    loss_case,
    one_hot,
    sizes,
)

flops, values = head.flops, head.values


def _labels(target, classes, ignore_index, label_smoothing):
    """-> smoothed labels (..., V), and whether a row counts (...)."""
    smooth = (1 - label_smoothing) * one_hot(target, classes) + label_smoothing / classes
    return smooth, counting(target, ignore_index)


def _divisor(counts, reduction):
    return counts.sum() if reduction == "mean" else 1.0


def linear_cross_entropy(
    input, linear_weight, target, *, linear_bias=None, reduction="mean", ignore_index=IGNORED, label_smoothing=0.0
):
    """input (..., D), linear_weight (V, D), target (...) -> (), or (...) for reduction "none"."""
    log_p = log_softmax(logits_of(input, linear_weight, linear_bias))
    labels, counts = _labels(target, linear_weight.shape[0], ignore_index, label_smoothing)
    losses = np.where(counts, -(labels * log_p).sum(axis=-1), 0.0)
    with np.errstate(invalid="ignore"):  # the mean over no rows is NaN
        return losses if reduction == "none" else np.divide(losses.sum(), _divisor(counts, reduction))


def _logit_gradient(dy, log_p, target, reduction, ignore_index, label_smoothing, sign=-1.0):
    """sign 1.0: the sum of the absolute terms instead."""
    labels, counts = _labels(target, log_p.shape[-1], ignore_index, label_smoothing)
    rows = np.where(counts, dy / max(_divisor(counts, reduction), 1.0), 0.0)
    return rows[..., None] * (np.exp(log_p) + sign * labels)


def linear_cross_entropy_grad(
    dy, input, linear_weight, target, *, linear_bias=None, reduction="mean", ignore_index=IGNORED, label_smoothing=0.0
):
    """dy () or (...) and the forward's arguments -> gradient of each float array by name."""
    log_p = log_softmax(logits_of(input, linear_weight, linear_bias))
    g = _logit_gradient(dy, log_p, target, reduction, ignore_index, label_smoothing)
    return linear_grads(g, input, linear_weight, linear_bias)


def linear_cross_entropy_magnitude(
    dy, input, linear_weight, target, *, linear_bias=None, reduction="mean", ignore_index=IGNORED, label_smoothing=0.0
):
    """Largest sum of absolute terms behind each result by name."""
    log_p = log_softmax(logits_of(input, linear_weight, linear_bias))
    absolute = [None if a is None else np.abs(a) for a in (input, linear_weight, linear_bias)]
    behind = logits_of(*absolute).max(initial=0.0) * (target.size if reduction == "sum" else 1)
    g = _logit_gradient(np.abs(dy), log_p, target, reduction, ignore_index, label_smoothing, sign=1.0)
    grads = linear_grads(g, *absolute)
    return {"output": float(behind)} | {name: float(a.max(initial=0.0)) for name, a in grads.items()}


def bytes_moved(case, itemsize):
    """Fewest bytes to move by pass: every array read once, every result written once, the logits never."""
    rows, _, _ = sizes(case)
    result = itemsize * (rows if case.options.get("reduction") == "none" else 1)
    return {name: moved - 4 * rows + result for name, moved in head.bytes_moved(case, itemsize).items()}


CASES = (
    loss_case("characters", "65 classes, as many as tinyshakespeare has characters", 40, 24, 65),
    loss_case("sum", "no division", 17, 40, 150, bias=True, reduction="sum"),
    loss_case("none", "an upstream gradient of its own for each row", 17, 40, 150, reduction="none"),
    loss_case("ignored", "padding counts in neither sum nor mean", 30, 24, 65, ignore_index=None),
    loss_case("ignored_class", "a class of the vocabulary is ignored; its logit still counts", 30, 24, 65, bias=True,
              ignore_index=3, reduction="none"),
    loss_case("all_ignored", "the mean over nothing is NaN, its gradient 0", 6, 24, 65, ignore_index=-1),
    loss_case("smoothed", "labels are mixed with the uniform distribution", 24, 32, 130, bias=True, ignore_index=-100,
              label_smoothing=0.1),
    loss_case("uniform", "labels are nothing but uniform", 12, 32, 130, label_smoothing=1.0, reduction="none"),
    loss_case("splits", "few rows, many classes: several programs share a row", 9, 16, 1000, label_smoothing=0.2),
    loss_case("peaked", "one class has all the probability", 24, 40, 130),
    loss_case("all_negative", "no logit near 0, which is what stands outside the vocabulary", 24, 40, 130, bias=True,
              label_smoothing=0.1),
    loss_case("large", "logits of some hundreds, whose exponentials overflow", 12, 40, 130, bias=True),
    loss_case("one", "every size 1: the loss is 0", 1, 1, 1, bias=True),
    loss_case("odd", "features that nothing divides: rows off 16-byte boundaries", 21, 37, 99, bias=True),
    loss_case("leading_axes", "batch and time", (2, 3, 5), 24, 65, reduction="none"),
    loss_case("vector", "1-D input: no row axis", (), 24, 65),
    loss_case("no_rows", "empty batch: NaN", 0, 16, 24),
    loss_case("no_features", "D = 0: the logits are the bias", 3, 0, 8, bias=True),
    loss_case("transposed", "weight stored (D, V), input stored (D, N)", 40, 48, 80,
              layouts={"linear_weight": "transposed", "input": "transposed"}),
    loss_case("expanded", "one row repeated by stride 0", 24, 32, 70, layouts={"input": "expanded"}),
    loss_case("offset", "arrays that start off a 16-byte boundary", 24, 32, 72, bias=True,
              layouts={"input": "offset", "linear_weight": "offset", "linear_bias": "offset"}),
    loss_case("qwen", "8B model, 152k classes: the size of published figures", 8192, 4096, 151936, production=True),
    loss_case("gpt2", "GPT-2 124M, 16 x 1024 tokens; no tile divides 50,257", 16384, 768, 50257, production=True),
    loss_case("small_model", "2048 wide, 129,920 classes", 8192, 2048, 129920, production=True),
    loss_case("t5", "32,128 classes, smoothed labels, bias", 8192, 1024, 32128, bias=True, label_smoothing=0.1,
              production=True),
    loss_case("shakespeare", "nanoGPT's character model, 64 x 256 tokens", 16384, 384, 65, production=True),
)  # fmt: skip

REFERENCE = Reference(
    "linear_cross_entropy",
    linear_cross_entropy,
    linear_cross_entropy_grad,
    linear_cross_entropy_magnitude,
    flops,
    bytes_moved,
    CASES,
    values=values,
)
