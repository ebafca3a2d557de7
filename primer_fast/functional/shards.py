"""The ops on DTensors: each process calls the op on the shards that it has, and its kernels run as ever.

A rule says how an op's tensors may lie along one axis of the device mesh, and how its results lie then. For each axis
the rule is taken that moves the fewest elements; that everything is replicated is always one. A shard of the inputs
means a sum of the gradients of what is replicated beside it, and the other way round.

Imported where the first DTensor comes: torch.distributed.tensor takes a second to import.
"""

__all__ = [
    "Rule",
    "attention",
    "call",
    "conv2d",
    "embedding",
    "layer_norm",
    "linear",
    "loss_rows",
    "max_pool2d",
    "mlp",
    "reduced",
]

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

WHOLE, SUM = Replicate(), Partial()


class Rule(NamedTuple):
    """Along one axis of the mesh; None in the place of what is None.

    Partial among ``tensors``: all have the tensor whole, and the results' sum shall hold it once.
    """

    tensors: Sequence[Placement | None]
    results: Sequence[Placement]


def call(name: str, function: Callable, tensors: Sequence[Any], rules: Sequence[Rule], shapes: Sequence) -> tuple:
    """``function`` of the local tensors -> its results, of these global shapes, as DTensors.

    tensors: DTensors of one mesh, tensors without gradients that all processes have alike, or None.

    Raises:
        TypeError: a tensor with a gradient is no DTensor where another is.
        ValueError: they lie on different meshes.
    """
    meshes = [t.device_mesh for t in tensors if isinstance(t, DTensor)]
    mesh = meshes[0]
    if any(m != mesh for m in meshes):
        raise ValueError(f"{name}: all DTensors must lie on one device mesh; got {meshes}")
    for t in tensors:
        if isinstance(t, Tensor) and not isinstance(t, DTensor) and t.requires_grad:
            raise TypeError(f"{name}: all tensors with gradients must be DTensors where one is; got a plain {t.dtype}")
    everywhere = [WHOLE] * mesh.ndim
    given = [
        t if t is None or isinstance(t, DTensor) else DTensor.from_local(t, mesh, everywhere, run_check=False)
        for t in tensors
    ]
    whole = Rule([None if t is None else WHOLE for t in given], [WHOLE] * len(shapes))
    chosen = [_cheapest((*rules, whole), given, axis) for axis in range(mesh.ndim)]
    local = [t if t is None else _local(t, i, chosen) for i, t in enumerate(given)]
    results = function(*local)
    results = results if isinstance(results, tuple) else (results,)
    return tuple(
        DTensor.from_local(
            result, mesh, [rule.results[i] for rule in chosen], run_check=False, shape=torch.Size(shape),
            stride=_strides(shape),
        )
        for i, (result, shape) in enumerate(zip(results, shapes, strict=True))
    )  # fmt: skip


def _cheapest(rules: Sequence[Rule], tensors, axis: int) -> Rule:
    """The first of those that move the fewest; a loop, since torch.compile knows no ``min`` with a key."""
    best, least = rules[-1], math.inf
    for rule in rules:
        moved = _moved(rule, tensors, axis)
        if moved < least:
            best, least = rule, moved
    return best


def _moved(rule: Rule, tensors, axis: int) -> float:
    """About how many elements go between processes before the rule holds."""
    moved = 0.0
    for t, wanted in zip(tensors, rule.tensors, strict=True):
        wanted = WHOLE if wanted == SUM else wanted
        if t is None or t.placements[axis] == wanted:
            continue
        if t.placements[axis] == WHOLE:
            moved += 1e-6 if isinstance(wanted, Shard) else 0
        else:
            moved += t.numel() * (2 if isinstance(t.placements[axis], Partial) and wanted == WHOLE else 1)
    return moved


def _local(t: DTensor, index: int, chosen: Sequence[Rule]) -> Tensor:
    placements = [rule.tensors[index] for rule in chosen]
    grads = [_of_gradient(p, rule) for p, rule in zip(placements, chosen, strict=True)]
    held = [WHOLE if p is None or p == SUM else p for p in placements]
    local = t.redistribute(placements=held).to_local(grad_placements=grads)
    local = local.wait() if hasattr(local, "wait") else local  # what is still on its way is no plain tensor
    if any(p == SUM and t.device_mesh.get_local_rank(axis) for axis, p in enumerate(placements)):
        local = local.masked_fill(torch.ones((), dtype=torch.bool, device=local.device), 0)  # the first adds it alone
    return local


def _of_gradient(placement, rule: Rule) -> Placement:
    if placement == SUM or (placement == WHOLE and any(p not in (None, WHOLE) for p in rule.tensors)):
        return SUM
    return placement


def _strides(shape) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _start(weight: DTensor) -> int:
    """The first row of the table that this process holds, where axis 0 is sharded by one mesh axis."""
    axis = next(i for i, p in enumerate(weight.placements) if p == Shard(0))
    size, share = weight.shape[0], weight.device_mesh.size(axis)
    return min(weight.device_mesh.get_local_rank(axis) * -(-size // share), size)


def linear(function, apply, x, weight, bias, activation):
    """x (..., K); apply: of the activation where a sum must be whole before it."""
    last, shape = x.dim() - 1, (*x.shape[:-1], weight.shape[0])
    some = lambda p: None if bias is None else p  # noqa: E731
    rules = [Rule([x_at, WHOLE, some(WHOLE)], [x_at]) for x_at in map(Shard, range(last))]
    rules.append(Rule([WHOLE, Shard(0), some(Shard(0))], [Shard(last)]))
    sums = Rule([Shard(last), Shard(1), some(SUM)], [SUM])
    tensors, plain = (x, weight, bias), lambda *t: function(*t, activation=activation)
    if activation is None:
        return call("linear", plain, tensors, [*rules, sums], [shape])[0]
    if all(_is(t, p) for t, p in ((x, Shard(last)), (weight, Shard(1)))):
        y = call("linear", function, tensors, [*rules, sums], [shape])[0]
        return apply(y.redistribute(placements=[WHOLE if p == SUM else p for p in y.placements]), activation)
    return call("linear", plain, tensors, rules, [shape])[0]


def _is(t, placement) -> bool:
    return isinstance(t, DTensor) and placement in t.placements


def mlp(function, x, weights, biases, activation, output_activation):
    """Two layers may share their hidden features out: the first by its rows, the second by its columns."""
    last, layers, shape = x.dim() - 1, len(weights), (*x.shape[:-1], weights[-1].shape[0])
    some = lambda at: [None if b is None else p for b, p in zip(biases, at, strict=True)]  # noqa: E731
    rules = [Rule([p, *[WHOLE] * layers, *some([WHOLE] * layers)], [p]) for p in map(Shard, range(last))]
    if layers == 2 and output_activation is None:
        rules.append(Rule([WHOLE, Shard(0), Shard(1), *some([Shard(0), SUM])], [SUM]))

    def run(x, *rest):
        return function(
            x, rest[:layers], rest[layers:], activation=activation, output_activation=output_activation
        )  # fmt: skip

    return call("mlp", run, (x, *weights, *biases), rules, [shape])[0]


def conv2d(function, x, weight, bias, size, stride, padding, dilation, groups, activation):
    """x (N, C, H, W); the samples are shared out, or the output channels."""
    some = lambda p: None if bias is None else p  # noqa: E731
    rules = [Rule([Shard(0), WHOLE, some(WHOLE)], [Shard(0)])]
    if groups == 1:
        rules.append(Rule([WHOLE, Shard(0), some(Shard(0))], [Shard(1)]))
    run = lambda *t: function(*t, stride, padding, dilation, groups, activation=activation)  # noqa: E731
    return call("conv2d", run, (x, weight, bias), rules, [(x.shape[0], weight.shape[0], *size)])[0]


def max_pool2d(function, x, size, return_indices):
    """x (N, C, H, W) -> y, with return_indices also the indices"""
    results = 1 + return_indices
    rules = [Rule([p], [p] * results) for p in (Shard(0), Shard(1))]
    return call("max_pool2d", function, (x,), rules, [(*x.shape[:2], *size)] * results)


def layer_norm(function, tensors, axes):
    """tensors: input, residual, weight, bias; axes: that are normalised -> y, with a residual also the sum."""
    x, residual, *_ = tensors
    rules = []
    for p in map(Shard, range(x.dim() - axes)):
        at = [p, p, WHOLE, WHOLE]
        rules.append(Rule([None if t is None else q for t, q in zip(tensors, at, strict=True)], [p] * 2))
    if residual is None:
        rules = [rule._replace(results=rule.results[:1]) for rule in rules]
    return call("layer_norm", function, tensors, rules, [x.shape] * (1 if residual is None else 2))


def embedding(function, ids, weight, padding_idx, position, position_ids):
    """Tables may be shared out by columns, and a table without positions by rows."""
    last, shape = ids.dim(), (*ids.shape, weight.shape[1])
    at = lambda *p: [None if t is None else q for t, q in zip((ids, weight, position, position_ids), p, strict=True)]  # noqa: E731
    rules = [Rule(at(WHOLE, Shard(1), Shard(1), WHOLE), [Shard(last)])]
    if position_ids is None or position_ids.shape == ids.shape:
        axes = range(last if position is None or position_ids is not None else last - 1)
        rules += [Rule(at(p, WHOLE, WHOLE, p), [p]) for p in map(Shard, axes)]
    tensors = ids, weight, position, position_ids
    rows = _is(weight, Shard(0)) and weight.placements.count(Shard(0)) == 1
    if rows and position is None and all(p in (WHOLE, Shard(0)) for p in weight.placements):
        start, whole = _start(weight), weight.shape[0]

        def run(ids, weight, *_):
            held = weight.shape[0]
            here = (ids >= start) & (ids < start + held)
            padding = None if padding_idx is None or not start <= padding_idx < start + held else padding_idx - start
            y = ids.new_zeros((*ids.shape, weight.shape[1]), dtype=weight.dtype)
            if held:
                y = function(torch.where(here, ids - start, 0), weight, padding).masked_fill(~here[..., None], 0)
            return y.masked_fill(((ids < 0) | (ids >= whole))[..., None], torch.nan)

        plain = [p == WHOLE for p in weight.placements]
        if all(plain[i] or not isinstance(ids, DTensor) or ids.placements[i] == WHOLE for i in range(len(plain))):
            return call("embedding", run, tensors, [Rule(at(WHOLE, Shard(0), None, None), [SUM])], [shape])[0]

    def run_whole(ids, weight, position, position_ids):
        return function(ids, weight, padding_idx, position=position, position_ids=position_ids)

    return call("embedding", run_whole, tensors, rules, [shape])[0]


def attention(function, q, k, v, mask, key_lengths, offsets, dropout_p):
    """q (B, H, T, D); the batch is shared out, or the heads. None: dropout, which the processes would draw apart."""
    tensors, rules = (q, k, v, mask, key_lengths, offsets), []
    for axis in (0, 1):
        p = Shard(axis)
        of_mask = p if mask is not None and mask.shape[axis] > 1 else WHOLE
        lengths, moved = ((p, p if offsets is not None and offsets.numel() > 1 else WHOLE), (WHOLE, WHOLE))[axis]
        wanted = [p, p, p, of_mask, lengths, moved]
        shares = next(t for t in tensors if isinstance(t, DTensor)).device_mesh.size()
        if axis == 0 or all(t.shape[1] % shares == 0 for t in (q, k, v)):
            rules.append(Rule([None if t is None else w for t, w in zip(tensors, wanted, strict=True)], [p]))
    placements = [p for t in tensors[:3] for p in (t.placements if isinstance(t, DTensor) else [WHOLE])]
    if dropout_p > 0 and any(p not in (Shard(0), Shard(1)) for p in placements):
        return None
    return call("scaled_dot_product_attention", function, tensors, rules, [(*q.shape[:3], v.shape[3])])[0]


def loss_rows(name, function, x, weight, bias, target, results):
    """x (..., D) -> results (...) each; the rows are shared out. A table that is shared out is gathered."""
    some = lambda p: None if bias is None else p  # noqa: E731
    rules = [Rule([p, WHOLE, some(WHOLE), p], [p] * results) for p in map(Shard, range(target.dim()))]
    return call(name, function, (x, weight, bias, target), rules, [target.shape] * results)


def reduced(losses, target, reduction, ignore_index):
    """The losses of rows, or their sum or mean over the rows that count, in float32 and rounded once."""
    if reduction == "none":
        return losses
    total = losses.float().sum() if losses.dtype != torch.float64 else losses.sum()
    total = total.redistribute(placements=[WHOLE] * total.device_mesh.ndim)
    if reduction == "mean":
        counts = (target != ignore_index).sum()
        counts = counts.full_tensor() if isinstance(counts, DTensor) else counts
        total = total / DTensor.from_local(counts, total.device_mesh, total.placements, run_check=False)
    return total.to(losses.dtype)
