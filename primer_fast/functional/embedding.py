"""Differentiable embedding with positions: checks here, math in kernels/embedding.py."""

__all__ = ["embedding", "embedding_plain"]

import math
from typing import Any

import torch
import torch.nn.functional as torch_F
from torch import Tensor

from primer_fast.backend import jit_traces, prepares, runs_triton, sharded, sums_narrowly, wants_gradient
from primer_fast.functional.checks import check_alike, check_tensors
from primer_fast.functional.operator import differentiable, differentiates, operator
from primer_fast.kernels.embedding import embedding_bwd, embedding_bwd_axis, embedding_fwd
from primer_fast.kernels.launch.prepared import prepared

_INDICES = (torch.int32, torch.int64)


def embedding(
    input: Tensor,  # (...) integers: rows of weight
    weight: Tensor,  # (V, D)
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    *,
    position: Tensor | None = None,  # (P, D): a row for each position
    position_ids: Tensor | None = None,  # integers that broadcast to input's shape; None: 0, 1, ... along its last axis
) -> Tensor:  # (..., D)
    """``weight[input] + position[position_ids]`` in one pass; the row of ``padding_idx`` gets no gradient.

    The sum is in float32 and rounded once. Gradients are summed in float32 in the order of the tokens, without atomics:
    two runs are bitwise equal. Nothing waits for the GPU.

    Tables of float32, float16 and bfloat16 on a GPU run in Triton; other devices and dtypes, and gradients that are
    themselves differentiated, take PyTorch's operators. There, an index outside its table is an IndexError; on
    a GPU its row of the result is NaN, and it has no gradient.

    Args:
        padding_idx: of weight; a negative one counts from its end.
        max_norm, norm_type, scale_grad_by_freq, sparse: torch's own, for its defaults alone.

    Raises:
        NotImplementedError: ``max_norm``, ``scale_grad_by_freq`` or ``sparse`` is set.
        ValueError: weight or position do not have two axes, or not as many features; there are fewer positions than
            the last axis of input; position_ids do not broadcast to input, or come without position; padding_idx is
            not a row of weight; devices differ.
        TypeError: an argument has the wrong type; indices are not int32 or int64.

    Source: torch.nn.functional.embedding; Vaswani et al., "Attention Is All You Need" (2017), section 3.4 and 3.5.
    """
    if max_norm is not None or scale_grad_by_freq or sparse:
        named = {"max_norm": max_norm, "scale_grad_by_freq": scale_grad_by_freq or None, "sparse": sparse or None}
        name, value = next((name, value) for name, value in named.items() if value is not None)
        raise NotImplementedError(f"embedding: {name}={value!r} is not built; use torch.nn.functional.embedding")
    if prepares(weight):
        row = padding_idx + len(weight) if type(padding_idx) is int and padding_idx < 0 else padding_idx
        plan = _launch.known(input, weight, position, position_ids, row)
        if plan is not None:
            if not wants_gradient(weight, position):
                return plan(input, weight, position, position_ids)
            return _apply(input, weight, position, (position_ids, row), plan)
    if jit_traces():
        return embedding_plain(input, weight, padding_idx, position=position, position_ids=position_ids)
    padding_idx = _check(input, weight, padding_idx, position, position_ids)
    if sharded(weight):
        from primer_fast.functional import shards

        return shards.embedding(embedding, input, weight, padding_idx, position, position_ids)
    if not (runs_triton(weight) and (position is None or runs_triton(position))):
        try:
            return embedding_plain(input, weight, padding_idx, position=position, position_ids=position_ids)
        except (IndexError, RuntimeError) as error:
            _check_indices(error, input=(input, weight), position_ids=(position_ids, position))
            raise
    return _call(wants_gradient(weight, position), input, weight, position, position_ids, padding_idx)


@prepared(4)
def _launch(ids, weight, position, position_ids, padding_idx):
    """ids (...), weight (V, D), position (P, D) or None, position_ids that broadcast to ids or None -> y (..., D).

    padding_idx: of the backward; here it says which arguments have been checked.
    """
    return embedding_fwd(ids, weight, position, *_cycle(ids, position_ids))


_launch_backward, _launch_backward_axis = prepared(2)(embedding_bwd), prepared(1)(embedding_bwd_axis)


def _cycle(ids, position_ids):
    """-> position_ids as one cycle that repeats through the tokens, or None where it is 0, 1, ...; its length."""
    if position_ids is None:
        return None, ids.shape[-1] if ids.dim() else 1
    shape = position_ids.shape
    while shape and shape[0] == 1:
        shape = shape[1:]
    if shape != ids.shape[ids.dim() - len(shape) :]:
        position_ids = position_ids.expand(ids.shape)
    return position_ids.reshape(-1).contiguous(), max(math.prod(position_ids.shape), 1)


@operator("embedding")
def _forward(
    input: Tensor, weight: Tensor, position: Tensor | None, position_ids: Tensor | None, padding_idx: int | None
) -> Tensor:
    return _launch(input, weight, position, position_ids, padding_idx)


@_forward.register_fake
def _(input, weight, position, position_ids, padding_idx):
    dtype = weight.dtype if position is None else torch.promote_types(weight.dtype, position.dtype)
    return weight.new_empty((*input.shape, weight.shape[1]), dtype=dtype)


@operator("embedding_backward")
def _gradient(dy: Tensor, input: Tensor, rows: int, dtype: torch.dtype, padding_idx: int | None) -> Tensor:
    return _launch_backward(dy, input, rows, dtype, padding_idx)


@_gradient.register_fake
def _(dy, input, rows, dtype, padding_idx):
    return dy.new_empty((rows, dy.shape[-1]), dtype=dtype)


@operator("embedding_backward_axis")
def _gradient_of_axis(dy: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    return _launch_backward_axis(dy, rows, dtype)


@_gradient_of_axis.register_fake
def _(dy, rows, dtype):
    return dy.new_empty((rows, dy.shape[-1]), dtype=dtype)


def _setup(ctx, inputs, output):
    ids, weight, position, position_ids, ctx.padding_idx = inputs
    ctx.save_for_backward(ids, position_ids)
    ctx.tables = [None if t is None else (t.shape[0], t.dtype) for t in (weight, position)]


def _backward(ctx, dy):
    ids, position_ids = ctx.saved_tensors
    plain = differentiates(dy)
    gradient: Any = _differentiable_gradient if plain else _gradient
    _, need_weight, need_position, *_ = ctx.needs_input_grad
    dweight = gradient(dy, ids, *ctx.tables[0], ctx.padding_idx) if need_weight else None
    if not need_position:
        return None, dweight, None
    if position_ids is None and not plain:
        return None, dweight, _gradient_of_axis(dy, *ctx.tables[1])
    if position_ids is None:
        position_ids = torch.arange(ids.shape[-1], device=ids.device)
    return None, dweight, gradient(dy, position_ids.expand(ids.shape), *ctx.tables[1], None)


def _differentiable_gradient(dy, ids, rows, dtype, padding):
    """Through torch's operators, which know their own derivatives."""
    counts = (ids >= 0) & (ids < rows)
    counts = counts if padding is None else counts & (ids != padding)
    dy = torch.where(counts[..., None], dy.float(), 0.0).reshape(-1, dy.shape[-1])
    ids = torch.where(counts, ids, 0).reshape(-1)
    return dy.new_zeros(rows, dy.shape[-1]).index_add(0, ids, dy).to(dtype)


_call, _apply = differentiable(_forward, _setup, _backward, leading=3)


def embedding_plain(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    *,
    position: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """The same through torch's own operators."""
    y = _rows(weight, input, padding_idx)
    if position is None:
        return y
    if position_ids is None:
        length = input.shape[-1]
        bound = torch.compiler.is_compiling() or jit_traces()  # a graph would be, to the length
        whole = not bound and position.shape[0] == length
        return y + (position if whole else position[:length])
    return y + _rows(position, position_ids)


def _rows(table, ids, padding_idx=None):
    """The rows of a table, which is copied to float32 where its gradient would be summed in 16 bits."""
    if not sums_narrowly(table):
        return torch_F.embedding(ids, table, padding_idx)
    return torch_F.embedding(ids, table.float(), padding_idx).to(table.dtype)


def _check_indices(error, **tables):
    """Raise IndexError where indices are outside their table, which is why torch raised ``error``."""
    for name, (ids, table) in tables.items():
        if ids is None:
            continue
        outside = (ids < 0) | (ids >= len(table))
        if outside.any():
            got = int(ids[outside][0])
            raise IndexError(f"embedding: {name} must be in [0, {len(table)}); got {got}") from error


def _check(input, weight, padding_idx, position, position_ids):
    """-> padding_idx counted from the start"""
    named = {"weight": weight, "position": position, "input": input, "position_ids": position_ids}
    check_tensors("embedding", named, optional=("position", "position_ids"))
    for name, t in named.items():
        if t is None:
            continue
        if name in ("input", "position_ids"):
            if t.dtype not in _INDICES:
                raise TypeError(f"embedding: {name} must be int32 or int64; got {t.dtype}")
        elif t.dim() != 2:
            raise ValueError(f"embedding: {name} must have shape (rows, D); got {tuple(t.shape)}")
    check_alike("embedding", named, dtypes=False)
    V, D = weight.shape
    if padding_idx is not None:
        if not isinstance(padding_idx, int) or isinstance(padding_idx, bool):
            raise TypeError(f"embedding: padding_idx must be an integer; got {type(padding_idx).__name__}")
        if not -V <= padding_idx < V:
            raise ValueError(f"embedding: padding_idx must be a row of weight, {-V} to {V - 1}; got {padding_idx}")
        padding_idx %= V
    if position is None:
        if position_ids is not None:
            raise ValueError(f"embedding: position_ids need position; got None and ids {tuple(position_ids.shape)}")
        return padding_idx
    if position.shape[1] != D:
        raise ValueError(f"embedding: position must have weight's {D} features; got {tuple(position.shape)}")
    if position_ids is None:
        if input.dim() == 0 or input.shape[-1] > position.shape[0]:
            raise ValueError(
                "embedding: position must have a row for each element of input's last axis; "
                f"got {position.shape[0]} for input {tuple(input.shape)}"
            )
        return padding_idx
    ids, shape = position_ids.shape, input.shape
    if len(ids) > len(shape) or any(a not in (1, b) for a, b in zip(ids[::-1], shape[::-1], strict=False)):
        raise ValueError(f"embedding: position_ids must broadcast to input {tuple(shape)}; got {tuple(ids)}")
    return padding_idx
