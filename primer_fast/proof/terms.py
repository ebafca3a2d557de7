"""What a float32 sum's rounding is relative to: the largest sum of absolute terms behind each result.

The same as ``{op}_magnitude`` of the references, but of torch tensors on their device, so that it can be had for real
sizes. They need no more than a few correct digits.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from primer_fast.functional.conv2d import conv2d_plain
from primer_fast.functional.embedding import embedding_plain
from primer_fast.functional.linear import linear_plain
from primer_fast.functional.max_pool2d import max_pool2d_plain
from primer_fast.functional.mlp import mlp_plain
from primer_fast.functional.scaled_dot_product_attention import _visible
from primer_fast.reference.case import arguments
from primer_fast.reference.linear_log_prob import IGNORED

HEADS = ("linear_cross_entropy", "linear_log_prob")  # their logits are taken some rows at a time
_LOGITS = 2**27  # elements of all logits that are in memory at once
Upstream = tuple[Tensor, ...]


def magnitudes(op: str, arrays: dict[str, Tensor], upstream: Upstream, options: dict) -> dict[str, Tensor]:
    """Results by name -> one number each, on the device.

    arrays: of an op, floats in float32. upstream: a gradient for each output, or none where only outputs are asked for.
    """
    sums = _SUMS[op](arrays, upstream, **options)
    return {name: t.amax().float() if t.numel() else t.new_zeros(()) for name, t in sums.items()}


def row_blocks(rows: int, classes: int) -> Iterator[slice]:
    """Which rows of a loss head are taken at a time, so that their logits fit into memory beside all else."""
    step = max(_LOGITS // max(classes, 1), 1)
    return (slice(begin, begin + step) for begin in range(0, rows, step))


def _differentiated(function: Callable[..., Any], arrays: dict[str, Tensor], upstream: Upstream, **options):
    """``function`` of the arrays and its gradients for absolute ones upstream."""
    floats = [name for name, t in arrays.items() if t.is_floating_point()] if upstream else []
    leaves = {name: t.detach().requires_grad_(name in floats) for name, t in arrays.items()}
    y = function(**arguments(leaves), **options)
    grads = torch.autograd.grad(y, [leaves[name] for name in floats], upstream[0].abs()) if floats else ()
    return {"output": y.detach(), **dict(zip(floats, grads, strict=True))}


def _absolute(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.abs() if t.is_floating_point() else t for name, t in arrays.items()}


def _linear(arrays, upstream, activation=None):
    return _differentiated(linear_plain, _absolute(arrays), upstream)


def _mlp(arrays, upstream, activation=None, output_activation=None):
    return _differentiated(mlp_plain, _absolute(arrays), upstream, activation=None)


def _conv2d(arrays, upstream, activation=None, **options):
    return _differentiated(conv2d_plain, _absolute(arrays), upstream, **options)


def _embedding(arrays, upstream, **options):
    return _differentiated(embedding_plain, _absolute(arrays), upstream, **options)


def _max_pool2d(arrays, upstream, **options):
    sums = _differentiated(max_pool2d_plain, arrays, upstream, **options)
    return sums | {"output": sums["output"].new_zeros(())}  # copied, not summed


def _layer_norm(arrays, upstream, normalized_shape, eps=1e-5, return_residual=False):
    x, residual, weight, bias = (arrays.get(name) for name in ("input", "residual", "weight", "bias"))
    axes = len(normalized_shape) if isinstance(normalized_shape, tuple | list) else 1
    last, lead = tuple(range(-axes, 0)), tuple(range(x.dim() - axes))
    if x.numel() == 0:
        return dict.fromkeys(("output", "sum", "input", "residual", "weight", "bias"), x.new_zeros(()))
    total, size = (x, x.abs()) if residual is None else (x + residual, x.abs() + residual.abs())
    centred = total - total.mean(last, keepdim=True)
    scale = (centred.square().mean(last, keepdim=True) + eps).rsqrt()
    # The mean's error is relative to the largest of its terms; times the scale it is that of (s - mean) scale
    normal = (centred * scale).abs_() + scale * size.mean(last, keepdim=True)
    y = normal if weight is None else normal * weight.abs()
    sums = {"output": y if bias is None else y + bias.abs(), "sum": size}
    if not upstream:
        return sums
    dy = upstream[0].abs()
    g = dy if weight is None else dy * weight.abs()
    ds = scale * (g + g.mean(last, keepdim=True) + normal * (g * normal).mean(last, keepdim=True))
    ds = ds + upstream[1].abs() if return_residual else ds
    dweight, dbias = (dy * normal, dy) if not lead else ((dy * normal).sum(lead), dy.sum(lead))
    return sums | {"input": ds, "residual": ds, "weight": dweight, "bias": dbias}


def _attention(
    arrays, upstream, is_causal=False, scale=None, enable_gqa=False, window=None, softcap=None, causal_offset=None
):
    """Sums of absolute products, where those of a score count once more, since an exponential turns their absolute
    error into a relative one."""
    q, k, v = (arrays[name] for name in ("query", "key", "value"))
    group = q.shape[-3] // max(k.shape[-3], 1)
    k, v = (t if group == 1 else t.repeat_interleave(group, -3) for t in (k, v))
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = q @ k.mT * factor
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    if (mask := arrays.get("attn_mask")) is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    offset = arrays.get("causal_offset", causal_offset)
    seen = _visible(q, k.shape[-2], is_causal, window, arrays.get("key_lengths"), offset)
    scores = scores if seen is None else scores.masked_fill(~seen, -math.inf)
    empty = (scores == -math.inf).all(dim=-1, keepdim=True)
    p = scores.masked_fill(empty, 0).softmax(dim=-1).masked_fill(empty, 0)
    q, k, v = q.abs(), k.abs(), v.abs()
    p = p * (1 + q @ k.mT * abs(factor))
    sums = {"output": p @ v}
    if not upstream:
        return sums
    g = upstream[0].abs()
    dp = g @ v.mT
    ds = p * (dp + (p * dp).sum(dim=-1, keepdim=True)) * abs(factor)
    by_group = {"key": ds.mT @ q, "value": p.mT @ g}
    return sums | {"query": ds @ k} | {name: t.unflatten(-3, (-1, group)).sum(-3) for name, t in by_group.items()}


def _head(logit_gradient):
    """The sums of a loss head; ``logit_gradient(log_p, rows, classes)`` is that of absolute terms at its logits."""

    def sums(arrays, upstream, **options):
        w, bias, target = arrays["linear_weight"], arrays.get("linear_bias"), arrays["target"].reshape(-1)
        x, temperature = arrays["input"].reshape(len(target), w.shape[1]), options.get("temperature", 1.0)
        size, behind, dx = w.abs(), x.new_zeros(()), torch.empty_like(x)
        gradient = logit_gradient(target, upstream, **options) if upstream else None
        dw, db = torch.zeros_like(w), w.new_zeros(len(w))
        for rows in row_blocks(len(target), len(w)):
            logits = torch.nn.functional.linear(x[rows], w, bias) / temperature
            absolute = torch.nn.functional.linear(x[rows].abs(), size, None if bias is None else bias.abs())
            behind = torch.maximum(behind, absolute.amax() / temperature)
            if gradient is not None:
                del absolute
                g = gradient(logits.log_softmax(dim=-1), rows)
                dx[rows], db = g @ size, db + g.sum(dim=0)
                dw.addmm_(g.mT, x[rows].abs())
        if options.get("reduction") == "sum":
            behind = behind * len(target)
        sums = {"output": behind, "entropy": behind}
        return sums | ({"input": dx, "linear_weight": dw, "linear_bias": db} if upstream else {})

    return sums


def add_labels(g: Tensor, target: Tensor, amount: Tensor) -> Tensor:
    """``g`` (N, V) with ``amount`` (N,) added at each row's target; a target outside [0, V) has no place."""
    known = (target >= 0) & (target < g.shape[-1])
    place = target.clamp(0, g.shape[-1] - 1)[:, None]
    return g.scatter_add_(1, place, torch.where(known, amount, 0).to(g.dtype)[:, None])


def _cross_entropy_gradient(target, upstream, reduction="mean", ignore_index=IGNORED, label_smoothing=0.0):
    counts = target != (IGNORED if ignore_index is None else ignore_index)
    number = counts.sum().clamp(min=1) if reduction == "mean" else 1
    amount = torch.where(counts, upstream[0].abs().reshape(-1) / number, 0)

    def gradient(log_p, rows):
        g = log_p.exp_().add_(label_smoothing / log_p.shape[-1]).mul_(amount[rows, None])
        return add_labels(g, target[rows], amount[rows] * (1 - label_smoothing))

    return gradient


def _log_prob_gradient(target, upstream, temperature=1.0, return_entropy=False, ignore_index=IGNORED):
    counts = target != (IGNORED if ignore_index is None else ignore_index)
    dy, *dentropy = (torch.where(counts, t.abs().reshape(-1) / temperature, 0) for t in upstream)

    def gradient(log_p, rows):
        p = log_p.exp()
        g = p * dy[rows, None]
        if dentropy:
            entropy = -(p * log_p).sum(dim=-1, keepdim=True)
            g += p.mul_(log_p.abs_().add_(entropy)).mul_(dentropy[0][rows, None])
        return add_labels(g, target[rows], dy[rows])

    return gradient


_SUMS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "linear": _linear,
    "mlp": _mlp,
    "conv2d": _conv2d,
    "max_pool2d": _max_pool2d,
    "layer_norm": _layer_norm,
    "embedding": _embedding,
    "scaled_dot_product_attention": _attention,
    "linear_cross_entropy": _head(_cross_entropy_gradient),
    "linear_log_prob": _head(_log_prob_gradient),
}
