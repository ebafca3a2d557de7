"""Softmax attention, in tiles that stay on the chip."""

import math

import torch
import torch.nn.functional as torch_F
from torch import Tensor


def scaled_dot_product_attention(
    query: Tensor,  # (..., H, T, D)
    key: Tensor,  # (..., Hk, S, D)
    value: Tensor,  # (..., Hk, S, Dv)
    attn_mask: Tensor | None = None,  # broadcasts to (..., H, T, S); bool: True takes part; floating: added
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: int | None = None,
    softcap: float | None = None,
    key_lengths: Tensor | None = None,  # (B,) int: keys from there on take no part
    causal_offset: int | Tensor | None = None,  # () or (B,) int: query i sees keys j <= i + offset
) -> Tensor:  # (..., H, T, Dv)
    """``softmax(query @ key^T * scale + mask) @ value``.

    is_causal: query i sees keys j <= i + causal_offset (0 if None: torch's top-left rule). A causal_offset implies
    is_causal. window w: of those, only j > i + causal_offset - w; without is_causal |i + causal_offset - j| < w.
    softcap c: scores become c tanh(score / c) before masks. Queries that see no key give 0.
    """
    return scaled_dot_product_attention_plain(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
        window=window, softcap=softcap, key_lengths=key_lengths, causal_offset=causal_offset,
    )  # fmt: skip


def scaled_dot_product_attention_plain(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False,
    *, window=None, softcap=None, key_lengths=None, causal_offset=None,
):  # fmt: skip
    """The same through torch's own operators."""
    own = (window, softcap, key_lengths, causal_offset)  # what torch's function does not have
    if all(option is None for option in own) and (attn_mask is None or not is_causal):
        return torch_F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    T, S = query.shape[-2], key.shape[-2]
    visible = _visible(T, S, is_causal, window, key_lengths, causal_offset, query.device)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        visible = attn_mask if visible is None else visible & attn_mask
        attn_mask = None
    if softcap is None:
        mask = visible
        if attn_mask is not None:
            mask = attn_mask if visible is None else attn_mask.masked_fill(~visible, -math.inf)
        return torch_F.scaled_dot_product_attention(
            query, key, value, mask, dropout_p, scale=scale, enable_gqa=enable_gqa
        )
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap)
    if attn_mask is not None:
        scores = scores + attn_mask
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    weights = scores.softmax(dim=-1)
    empty = (scores == -math.inf).all(dim=-1, keepdim=True)
    return torch.dropout(weights.masked_fill(empty, 0), dropout_p, True) @ value


def _visible(T, S, is_causal, window, key_lengths, causal_offset, device):
    """Which keys each query sees: bool that broadcasts to (B, H, T, S), or None for all."""
    i, j = torch.arange(T, device=device)[:, None], torch.arange(S, device=device)
    visible = None
    if isinstance(causal_offset, Tensor):
        causal_offset = causal_offset.to(device).view(-1, 1, 1, 1)
    i = i + (0 if causal_offset is None else causal_offset)
    if is_causal or causal_offset is not None:
        visible = j <= i
        if window is not None:
            visible = visible & (j > i - window)
    elif window is not None:
        visible = (i - j).abs() < window
    if key_lengths is not None:
        inside = j < key_lengths.to(device).view(-1, 1, 1, 1)
        visible = inside if visible is None else visible & inside
    return visible
