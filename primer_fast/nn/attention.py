"""Multi-head attention."""

__all__ = ["MultiheadAttention"]

import math

import torch
import torch.nn.attention
import torch.nn.functional as torch_F
from torch import Tensor
from torch.jit import is_scripting

from primer_fast import functional as F
from primer_fast.nn.graphs import is_leaf, node_of


class MultiheadAttention(torch.nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention``: same parameters, same state dict, same results; the heads attend in one kernel.

    ``need_weights=True``, torch's default, asks for a matrix that the kernel never has: weights then come from torch's
    plain operators, T x S of them per head, and the output from those weights. Pass ``need_weights=False`` to be fast.

    Where both are given a query sees what neither mask takes out. Queries that see nothing: the kernel gives zeros
    before the output projection, the weights are NaN, both as torch's.

    Raises:
        ValueError: ``embed_dim`` is no multiple of ``num_heads``.
        NotImplementedError: ``add_bias_kv`` or ``add_zero_attn``.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device=None,
        dtype=None,
    ):
        for name, asked in (("add_bias_kv", add_bias_kv), ("add_zero_attn", add_zero_attn)):
            if asked:
                raise NotImplementedError(f"MultiheadAttention: {name} is not built; use torch.nn.MultiheadAttention")
        if embed_dim <= 0 or num_heads <= 0 or embed_dim % num_heads:
            raise ValueError(
                "MultiheadAttention: embed_dim must be a positive multiple of num_heads; "
                f"got embed_dim {embed_dim} and num_heads {num_heads}"
            )
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            kdim=kdim,
            vdim=vdim,
            batch_first=batch_first,
            device=device,
            dtype=dtype,
        )

    def forward(
        self,
        query: Tensor,  # (T, N, E), (N, T, E) with batch_first, or (T, E)
        key: Tensor,  # the same with S and kdim
        value: Tensor,  # the same with S and vdim
        key_padding_mask: Tensor | None = None,  # (N, S) or (S,); bool: True is padding; floating: added
        need_weights: bool = True,
        attn_mask: Tensor | None = None,  # (T, S) or (N heads, T, S); bool: True takes no part; floating: added
        average_attn_weights: bool = True,
        is_causal: bool = False,  # a hint: attn_mask is the causal mask
    ) -> tuple[Tensor, Tensor | None]:  # of query's shape; (N, T, S), with heads before T if not averaged, or None
        if is_scripting():
            return self._scripted(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        else:
            options = key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            if is_leaf(self, query):
                return node_of(self, query, key, value, *options)
            return self._attend(query, key, value, *options)

    def _attend(
        self, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
    ):  # fmt: skip
        if torch._C._get_tracing_state() is None:  # torch.jit.trace, under which sizes are tensors
            self._check(query, key, value, key_padding_mask, attn_mask, is_causal)
        batched = query.dim() == 3
        if not batched:
            query, key, value = _each(lambda x: x[None], query, key, value)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = _each(lambda x: x.transpose(0, 1), query, key, value)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in self._project(query, key, value))
        dropout = self.dropout if self.training else 0.0
        hinted = is_causal and key_padding_mask is None and not need_weights
        mask = None if hinted else _visible(attn_mask, key_padding_mask, query.shape[0], q.dtype)
        weights = None
        if need_weights:
            output, weights = _attend_with_weights(q, k, v, mask, dropout)
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            output = F.scaled_dot_product_attention(q, k, v, mask, dropout, hinted)
        output = F.linear(output.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        if not batched:
            return output[0], weights if weights is None else weights[0]
        return output if self.batch_first else output.transpose(0, 1), weights

    def _scripted(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, need_weights: bool,
        attn_mask: Tensor | None, average_attn_weights: bool, is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """``forward`` through torch's function, as TorchScript can compile it."""
        turned = self.batch_first and query.dim() == 3
        if turned:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        output, weights = torch_F.multi_head_attention_forward(
            query, key, value, self.embed_dim, self.num_heads, self.in_proj_weight, self.in_proj_bias, None, None,
            False, self.dropout, self.out_proj.weight, self.out_proj.bias, self.training, key_padding_mask,
            need_weights, attn_mask, not self._qkv_same_embed_dim, self.q_proj_weight, self.k_proj_weight,
            self.v_proj_weight, average_attn_weights=average_attn_weights, is_causal=is_causal,
        )  # fmt: skip
        return output.transpose(0, 1) if turned else output, weights

    def _project(self, query, key, value):  # each (N, T or S, E of it) -> three of (N, T or S, E)
        bias = self.in_proj_bias
        weights: tuple[Tensor, ...]
        if not self._qkv_same_embed_dim:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key and key is value:
            return F.linear(query, self.in_proj_weight, bias).chunk(3, dim=-1)
        else:
            weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        return [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]

    def _check(self, query, key, value, key_padding_mask, attn_mask, is_causal):
        def wrong(kind, what, got):
            return kind(f"MultiheadAttention: {what}; got {got}")

        shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        widths = (self.embed_dim, self.kdim, self.vdim)
        if query.dim() not in (2, 3) or key.dim() != query.dim() or value.dim() != query.dim():
            raise wrong(ValueError, "query, key and value must all have 3 axes, or 2 without a batch", shapes)
        if tuple(x.shape[-1] for x in (query, key, value)) != widths:
            raise wrong(ValueError, f"query, key and value must end in {widths}", shapes)
        batch, time = (0, 1) if self.batch_first else (1, 0)
        N = 1 if query.dim() == 2 else query.shape[batch]
        T, S = (x.shape[0] if query.dim() == 2 else x.shape[time] for x in (query, key))
        if key.shape[:-1] != value.shape[:-1] or (query.dim() == 3 and key.shape[batch] != N):
            raise wrong(ValueError, "key and value must have one length, and all three one batch size", shapes)
        for name, mask, fits in (
            ("key_padding_mask", key_padding_mask, [(N, S) if query.dim() == 3 else (S,)]),
            ("attn_mask", attn_mask, [(T, S), (N * self.num_heads, T, S)]),
        ):
            if mask is not None and tuple(mask.shape) not in fits:
                raise wrong(ValueError, f"{name} must be {' or '.join(map(str, fits))}", tuple(mask.shape))
            if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
                raise wrong(TypeError, f"{name} must be bool or floating", mask.dtype)
        if is_causal and attn_mask is None:
            raise wrong(ValueError, "is_causal says that attn_mask is causal and needs it", "attn_mask None")


def __getattr__(name):
    """The names of torch.nn.attention, SDPBackend and sdpa_kernel, since this module takes its name."""
    if name.startswith("__") or not hasattr(torch.nn.attention, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(torch.nn.attention, name)


def _each(change, query, key, value):
    """Call ``change`` on each. Where two are the same tensor their results are too, so that it is projected once."""
    q = change(query)
    k = q if key is query else change(key)
    return q, k, q if value is query else k if value is key else change(value)


def _visible(attn_mask, key_padding_mask, N, dtype):
    """Both masks as one for scaled_dot_product_attention: bool, where True takes part, or floating; or None."""
    masks = []
    if attn_mask is not None:
        masks.append(attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.unflatten(0, (N, -1)))
    if key_padding_mask is not None:
        masks.append(key_padding_mask[:, None, None])
    if not masks:
        return None
    if all(mask.dtype == torch.bool for mask in masks):
        return ~(masks[0] if len(masks) == 1 else masks[0] | masks[1])
    return sum(
        torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
        if mask.dtype == torch.bool
        else mask.to(dtype)
        for mask in masks
    )


def _attend_with_weights(q, k, v, mask, dropout):
    """-> output (N, heads, T, d), weights (N, heads, T, S) after dropout, as torch's."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    weights = torch.dropout(scores.softmax(dim=-1), dropout, True)
    return weights @ v, weights
