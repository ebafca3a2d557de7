"""Every op once, small, beside PyTorch's own: what the tests of this folder call."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as torch_F
from torch import Tensor

from primer_fast import functional as F

IDS = torch.tensor([[5, 0, 6, 5], [1, 5, 2, 0]])
CLASSES = torch.tensor([3, 17, 0, 3, 16, 9])


@dataclass(frozen=True)
class Op:
    shapes: dict[str, tuple[int, ...]]  # of the tensors that have gradients, the first is the input
    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]  # through PyTorch's operators
    named: bool = True  # PyTorch has this op itself

    def inputs(self, dtypes=torch.float32, device="cpu", seed=0) -> list[Tensor]:
        """Leaves that require gradients; one dtype, or one for each."""
        generator = torch.Generator("cpu").manual_seed(seed)
        dtypes = dtypes if isinstance(dtypes, list | tuple) else [dtypes] * len(self.shapes)
        drawn = [
            torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") for shape in self.shapes.values()
        ]
        return [x.to(device, dtype).requires_grad_() for x, dtype in zip(drawn, dtypes, strict=True)]


def upstream(y: Tensor) -> Tensor:
    """A random gradient of ``y``, always the same."""
    generator = torch.Generator("cpu").manual_seed(9)
    return torch.randn(y.shape, generator=generator, dtype=torch.float64, device="cpu").to(y.device, y.dtype)


@functools.cache
def _copy(name: str, device: torch.device) -> Tensor:  # made once: in a CUDA graph there is no copy from the host
    return {"ids": IDS, "classes": CLASSES}[name].to(device)


def ids(other: Tensor) -> Tensor:
    return _copy("ids", other.device)


def classes(other: Tensor) -> Tensor:
    return _copy("classes", other.device)


def _cross_entropy(x, w, b):
    if hasattr(torch_F, "linear_cross_entropy"):  # torch 2.11 does not have it yet
        return torch_F.linear_cross_entropy(x, w, classes(x), linear_bias=b)
    return torch_F.cross_entropy(torch_F.linear(x, w, b), classes(x))


def _log_prob(x, w, b):
    logits = torch_F.linear(x, w, b)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.log_softmax(-1).gather(-1, classes(x)[:, None])[:, 0]


def _attention(function):
    return lambda q, k, v: function(q, k, v, is_causal=True)


LINEAR = {"input": (6, 16), "weight": (18, 16), "bias": (18,)}
MLP = {"input": (6, 4), "weight": (7, 4), "other": (3, 7), "bias": (7,), "shift": (3,)}
CONV = {"input": (2, 4, 5, 5), "weight": (6, 4, 3, 3), "bias": (6,)}
NORM = {"input": (6, 16), "weight": (16,), "bias": (16,)}
ATTENTION = dict.fromkeys(("query", "key", "value"), (1, 2, 8, 16))

OPS = {
    "linear": Op(LINEAR, F.linear, torch_F.linear),
    "linear gelu": Op(
        LINEAR, lambda *a: F.linear(*a, activation="gelu"), lambda *a: torch_F.gelu(torch_F.linear(*a)), False
    ),
    "mlp": Op(
        MLP,
        lambda x, v, w, b, c: F.mlp(x, (v, w), (b, c)),
        lambda x, v, w, b, c: torch_F.linear(torch_F.gelu(torch_F.linear(x, v, b)), w, c),
    ),
    "mlp tanh, output": Op(
        MLP,
        lambda x, v, w, b, c: F.mlp(x, (v, w), (b, c), activation="tanh", output_activation="silu"),
        lambda x, v, w, b, c: torch_F.silu(torch_F.linear(torch.tanh(torch_F.linear(x, v, b)), w, c)),
        False,
    ),
    "conv2d": Op(CONV, lambda *a: F.conv2d(*a, padding=1), lambda *a: torch_F.conv2d(*a, padding=1)),
    "conv2d tanh": Op(
        CONV, lambda *a: F.conv2d(*a, activation="tanh"), lambda *a: torch.tanh(torch_F.conv2d(*a)), False
    ),
    "max_pool2d": Op({"input": (2, 3, 6, 6)}, lambda x: F.max_pool2d(x, 2), lambda x: torch_F.max_pool2d(x, 2)),
    "layer_norm": Op(
        NORM, lambda x, w, b: F.layer_norm(x, 16, w, b), lambda x, w, b: torch_F.layer_norm(x, (16,), w, b)
    ),
    "layer_norm residual": Op(
        NORM | {"residual": (6, 16)},
        lambda x, w, b, r: F.layer_norm(x, 16, w, b, residual=r),
        lambda x, w, b, r: torch_F.layer_norm(x + r, (16,), w, b),
        False,
    ),
    "embedding": Op({"weight": (7, 16)}, lambda w: F.embedding(ids(w), w), lambda w: torch_F.embedding(ids(w), w)),
    "embedding position": Op(
        {"weight": (7, 16), "position": (5, 16)},
        lambda w, p: F.embedding(ids(w), w, position=p),
        lambda w, p: torch_F.embedding(ids(w), w) + p[:4],
        False,
    ),
    "scaled_dot_product_attention": Op(
        ATTENTION, _attention(F.scaled_dot_product_attention), _attention(torch_F.scaled_dot_product_attention)
    ),
    "linear_cross_entropy": Op(
        LINEAR,
        lambda x, w, b: F.linear_cross_entropy(x, w, classes(x), linear_bias=b),
        _cross_entropy,
    ),
    "linear_log_prob": Op(LINEAR, lambda x, w, b: F.linear_log_prob(x, w, classes(x), linear_bias=b), _log_prob, False),
}
NAMED = [name for name, op in OPS.items() if op.named]
