"""The operators primer_fast::embedding, embedding_backward and embedding_backward_axis."""

import math

import torch
from torch import Tensor

from primer_fast.kernels.embedding import embedding_bwd, embedding_bwd_axis, embedding_fwd
from primer_fast.kernels.prepared import prepared
from primer_fast.library.register import operator


@prepared(4)
def forward(ids, weight, position, position_ids, padding_idx):
    """ids (...), weight (V, D), position (P, D) or None, position_ids that broadcast to ids or None -> y (..., D).

    padding_idx: of the backward; here it says which arguments have been checked.
    """
    return embedding_fwd(ids, weight, position, *_cycle(ids, position_ids))


gradient, gradient_of_axis = prepared(2)(embedding_bwd), prepared(1)(embedding_bwd_axis)


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
def embedding(
    input: Tensor, weight: Tensor, position: Tensor | None, position_ids: Tensor | None, padding_idx: int | None
) -> Tensor:
    return forward(input, weight, position, position_ids, padding_idx)


@embedding.register_fake
def _(input, weight, position, position_ids, padding_idx):
    dtype = weight.dtype if position is None else torch.promote_types(weight.dtype, position.dtype)
    return weight.new_empty((*input.shape, weight.shape[1]), dtype=dtype)


@operator("embedding_backward")
def embedding_backward(dy: Tensor, input: Tensor, rows: int, dtype: torch.dtype, padding_idx: int | None) -> Tensor:
    return gradient(dy, input, rows, dtype, padding_idx)


@operator("embedding_backward_axis")
def embedding_backward_axis(dy: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    return gradient_of_axis(dy, rows, dtype)


@embedding_backward.register_fake
def _(dy, input, rows, dtype, padding_idx):
    return dy.new_empty((rows, dy.shape[-1]), dtype=dtype)


@embedding_backward_axis.register_fake
def _(dy, rows, dtype):
    return dy.new_empty((rows, dy.shape[-1]), dtype=dtype)


def _setup(ctx, inputs, output):
    ids, weight, position, position_ids, ctx.padding_idx = inputs
    ctx.save_for_backward(ids, position_ids)
    ctx.tables = [None if t is None else (t.shape[0], t.dtype) for t in (weight, position)]


def _backward(ctx, dy):
    ids, position_ids = ctx.saved_tensors
    dweight = dposition = None
    if ctx.needs_input_grad[1]:
        dweight = embedding_backward(dy, ids, *ctx.tables[0], ctx.padding_idx)
    if ctx.needs_input_grad[2]:
        if position_ids is None:
            dposition = embedding_backward_axis(dy, *ctx.tables[1])
        else:
            dposition = embedding_backward(dy, position_ids.expand(ids.shape), *ctx.tables[1], None)
    return None, dweight, dposition, None, None


embedding.register_autograd(_backward, setup_context=_setup)
