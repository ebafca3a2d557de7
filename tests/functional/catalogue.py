"""Inputs of every op for the tests that hold for all ops alike."""

import numpy as np
import torch

from primer_fast import functional as F
from primer_fast.functional.activation import ACTIVATIONS

_LINEAR = {"input": (3, 5), "weight": (4, 5)}
_MLP = {"input": (3, 5), "weights.0": (4, 5), "weights.1": (2, 4), "biases.0": (4,), "biases.1": (2,)}
_HEAD = {"input": (4, 5), "linear_weight": (7, 5), "linear_bias": (7,)}
_TARGET = np.array([0, 6, 3, 2])
_IDS = np.array([[0, 4, 4], [2, 0, 1]])


def _attention(**options):
    heads = 2 if "enable_gqa" in options else 4
    shapes = {"query": (2, 4, 3, 6), "key": (2, heads, 5, 6), "value": (2, heads, 5, 7)}
    return "scaled_dot_product_attention", shapes, options


def _conv2d(activation, **options):
    shapes = {"input": (2, 4, 7, 8), "weight": (6, 4 // options.get("groups", 1), 2, 3), "bias": (6,)}
    return "conv2d", shapes, options | {"activation": activation}


def _layer_norm(shape, row):
    shapes = {"input": shape, "weight": row, "bias": row, "residual": shape}
    return "layer_norm", shapes, {"normalized_shape": row, "eps": 0.1, "return_residual": True}


def _pool(**options):
    return "max_pool2d", {"input": (2, 2, 7, 8)}, options


def _embedding(ids):
    options = {"input": _IDS, "padding_idx": 1, "position_ids": ids}
    return "embedding", {"weight": (5, 3), "position": (4, 3)}, options


_ALL = [None, *ACTIVATIONS]
# op, shapes of the arrays that have gradients, options: where the reference's gradient is compared with differences
DERIVATIVES = [
    *(("linear", _LINEAR | bias, {"activation": a}) for a in _ALL for bias in ({}, {"bias": (4,)})),
    *(("mlp", _MLP, {"activation": a, "output_activation": o}) for a in _ALL for o in (None, "gelu", "sigmoid")),
    *(
        _conv2d(activation, **options)
        for activation in (None, "tanh")
        for options in (
            {}, {"stride": (2, 3), "padding": (1, 2)}, {"padding": "same", "dilation": (2, 1)},
            {"groups": 2, "dilation": 2, "padding": 3, "stride": 2},
        )
    ),
    _layer_norm((4, 6), (6,)), _layer_norm((3, 2, 4), (2, 4)),
    _pool(kernel_size=3, stride=2, padding=1),
    _pool(kernel_size=(2, 3), stride=(3, 1), dilation=(1, 2), ceil_mode=True),
    _embedding(None), _embedding(np.array([[2, 0, 2], [1, 1, 3]])),
    _attention(), _attention(is_causal=True), _attention(is_causal=True, window=2), _attention(window=2),
    _attention(softcap=0.7), _attention(scale=-0.5), _attention(key_lengths=np.array([0, 4])),
    _attention(causal_offset=np.array([-2, 3])), _attention(enable_gqa=True),
    _attention(attn_mask=np.random.default_rng(1).normal(size=(3, 5)), softcap=2.0),
    *(
        ("linear_cross_entropy", _HEAD,
         {"target": _TARGET, "reduction": reduction, "ignore_index": 3, "label_smoothing": 0.1})
        for reduction in ("mean", "sum", "none")
    ),
    ("linear_log_prob", _HEAD, {"target": _TARGET, "temperature": 0.7, "return_entropy": True}),
]  # fmt: skip


def _leaves(*shapes, integers=None):
    """device -> integers below the first number, of the shape that is the second, if asked for, and leaves."""

    def make(device):
        drawn = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
        return drawn if integers is None else [torch.randint(*integers, device=device), *drawn]

    return make


def _lasting(make):
    """The same with the first leaf channels_last."""

    def made(device):
        first, *others = make(device)
        return [first.detach().contiguous(memory_format=torch.channels_last).requires_grad_(), *others]

    return made


_QKV = _leaves(*[(2, 2, 70, 16)] * 3)
_VOCABULARY = _leaves((20, 24), (700, 24), integers=(700, (20,)))
_MANY = _lasting(_leaves((1, 32, 5, 4), (40, 32, 2, 2), (40,)))
_FEW = _lasting(_leaves((2, 3, 6, 5), (20, 3, 2, 3), (20,)))
# name -> the call, and what makes its tensors: sums that are long enough to be shared out among programs
LONG_SUMS = {
    "linear": (F.linear, _leaves((24, 2100), (40, 2100), (40,))),
    "linear gelu": (lambda *t: F.linear(*t, activation="gelu"), _leaves((24, 2100), (40, 2100), (40,))),
    "mlp": (
        lambda x, v, w, b, c: F.mlp(x, (v, w), (b, c), output_activation="sigmoid"),
        _leaves((24, 2100), (24, 2100), (1500, 24), (24,), (1500,)),
    ),
    "conv2d many channels": (lambda *t: F.conv2d(*t, padding=1, activation="gelu"), _MANY),
    "conv2d few channels": (lambda *t: F.conv2d(*t, padding=1), _FEW),
    "max_pool2d": (lambda x: F.max_pool2d(x, 5, 1, 2), _leaves((2, 5, 17, 19))),
    "layer_norm": (
        lambda x, r, w, b: F.layer_norm(x, 40, w, b, residual=r), _leaves((600, 40), (600, 40), (40,), (40,)),
    ),
    "embedding": (
        lambda i, w, p: F.embedding(i, w, position=p), _leaves((7, 24), (40, 24), integers=(7, (6, 40))),
    ),
    "scaled_dot_product_attention causal": (lambda *t: F.scaled_dot_product_attention(*t, is_causal=True), _QKV),
    "scaled_dot_product_attention lengths": (
        lambda *t: F.scaled_dot_product_attention(*t, key_lengths=torch.tensor([50, 0], device=t[0].device)), _QKV,
    ),
    "scaled_dot_product_attention dropout": (lambda *t: F.scaled_dot_product_attention(*t, dropout_p=0.3), _QKV),
    "linear_cross_entropy": (
        lambda t, x, w: F.linear_cross_entropy(x, w, t, label_smoothing=0.1), _VOCABULARY,
    ),
    "linear_log_prob": (lambda t, x, w: F.linear_log_prob(x, w, t, return_entropy=True), _VOCABULARY),
}  # fmt: skip
