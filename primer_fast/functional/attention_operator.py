"""Attention's launchers, and its operators of torch.library: the options of a call as the kernels take them."""

__all__ = ["NO_SOFTCAP", "Attention", "forward", "gradients", "launch"]

import math
from typing import NamedTuple

import torch
from torch import Tensor

from primer_fast.functional.operator import operator
from primer_fast.kernels.attention.decode import attention_decode
from primer_fast.kernels.attention.mask import FAR
from primer_fast.kernels.attention.onepass import attention_bwd_onepass, chosen, supported
from primer_fast.kernels.attention.tile import empty_like_rows
from primer_fast.kernels.launch.prepared import prepared
from primer_fast.kernels.scaled_dot_product_attention import (
    Band,
    Scoring,
    attention_backward,
    attention_forward,
)

_FAR = FAR.value
NO_SOFTCAP = 1e19  # a softcap from here on changes no score that float32 holds, and may be too large to divide by
_DECODED_ROWS, _DECODED_KEYS = 64, 256  # at most so many queries of a key head, at least so many keys: keys are split


class Attention(NamedTuple):
    """What attention is told beside query, key and value, in the operators' order."""

    mask: Tensor | None  # broadcasts to (B, H, T, S), bool or floating
    key_lengths: Tensor | None  # B integers
    offsets: Tensor | None  # 1 or B integers, in place of offset
    seed: Tensor | None  # (1,) int64, of dropout; None: the forward draws one
    causal: bool
    offset: int
    window: int | None
    scale: float | None  # None: 1 / sqrt(D)
    softcap: float | None
    dropout_p: float

    def band(self, B: int, S: int) -> Band:
        offset, offsets, lengths = max(-_FAR, min(self.offset, _FAR)), None, None
        if self.offsets is not None:
            offset, offsets = 0, self.offsets.reshape(-1).expand(B).contiguous()
        if self.key_lengths is not None:
            lengths = self.key_lengths.reshape(-1).contiguous()
        left = None if self.window is None else min(self.window, _FAR) - 1
        right = 0 if self.causal else left
        if right is not None and offsets is None and left is None and offset >= S - 1:
            right = None  # the first query sees every key
        return Band(left, right, offset, offsets, lengths)

    def scoring(self, q: Tensor, S: int) -> Scoring:
        *rows, D = q.shape
        scale = 1 / math.sqrt(D) if self.scale is None else self.scale
        mask = self.mask if self.mask is None else self.mask.expand(*rows, S)
        softcap = self.softcap if self.softcap is not None and self.softcap < NO_SOFTCAP else None
        return Scoring(scale, softcap, mask, self.dropout_p, self.seed)


@prepared(7)
def launch(q, k, v, *attention_keep_precision):
    """q (B, H, T, D), k (B, HK, S, D), v (B, HK, S, DV) -> out (B, H, T, DV), lse, None unless keep, dropout's seed."""
    *fields, keep, precision = attention_keep_precision
    attention = Attention(*fields)
    q, k, v = map(_adjacent, (q, k, v))
    (B, H, T, _), (_, HK, S, _) = q.shape, v.shape
    if attention.dropout_p > 0 and attention.seed is None:
        attention = attention._replace(seed=torch.randint(2**62, (1,), device=q.device))
    scoring = attention.scoring(q, S)
    if not keep and scoring.dropout_p == 0 and S >= _DECODED_KEYS and H // max(HK, 1) * T <= _DECODED_ROWS:
        lengths = attention.key_lengths if attention.key_lengths is None else attention.key_lengths.reshape(-1)
        out = attention_decode(
            q, k, v, scale=scoring.scale, causal=attention.causal,
            causal_offset=attention.offset if attention.offsets is None else attention.offsets,
            window=attention.window, softcap=scoring.softcap, key_lengths=lengths, mask=scoring.mask,
            precision=precision,
        )  # fmt: skip
        return out, None, None
    return *attention_forward(q, k, v, attention.band(B, S), scoring, precision, keep), attention.seed


@prepared(10)
def _launch_backward(dout, q, k, v, out, lse, *attention_fast_needed_precision):
    *fields, fast, (need_q, need_k, need_v), precision = attention_fast_needed_precision
    attention = Attention(*fields)
    dout, q, k, v = map(_adjacent, (dout, q, k, v))
    band, scoring = attention.band(len(q), k.shape[2]), attention.scoring(q, k.shape[2])
    if fast and need_q and need_k and need_v and _one_pass(q, k, v, band, scoring):
        return attention_bwd_onepass(
            dout, q, k, v, out, lse, scale=scoring.scale, causal=band.right is not None, causal_offset=band.offset,
        )  # fmt: skip
    dq, dk, dv = attention_backward(
        dout, q, k, v, out, lse, band, scoring, precision, (need_q, need_k or need_v)
    )  # fmt: skip
    return dq, dk if need_k else None, dv if need_v else None


def _adjacent(t: Tensor) -> Tensor:
    """With elements of the last axis adjacent in memory."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _one_pass(q, k, v, band, scoring):
    possible = q.numel() > 0 and k.numel() > 0 and band.offsets is None and supported(
        q, k, v, window=band.left, softcap=scoring.softcap, key_lengths=band.lengths, mask=scoring.mask,
        dropout_p=scoring.dropout_p,
    )  # fmt: skip
    return possible and chosen(q, k, band.right is not None)


@operator("scaled_dot_product_attention")
def forward(
    query: Tensor, key: Tensor, value: Tensor,
    mask: Tensor | None, key_lengths: Tensor | None, offsets: Tensor | None, seed: Tensor | None,
    causal: bool, offset: int, window: int | None, scale: float | None, softcap: float | None, dropout_p: float,
    fast_backward: bool, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> out, and lse where it is kept"""
    attention = mask, key_lengths, offsets, seed, causal, offset, window, scale, softcap, dropout_p
    return launch(query, key, value, *attention, keep, torch.get_float32_matmul_precision())[:2]


@forward.register_fake
def _(query, key, value, *attention_fast_keep):
    out = empty_like_rows(query, value.shape[3])
    mask, *_, keep = attention_fast_keep
    rows = (2, *query.shape[:3]) if mask is not None and mask.is_floating_point() else query.shape[:3]
    return out, query.new_empty(rows, dtype=torch.float32) if keep else None


@operator("scaled_dot_product_attention_backward")
def gradients(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    mask: Tensor | None, key_lengths: Tensor | None, offsets: Tensor | None, seed: Tensor | None,
    causal: bool, offset: int, window: int | None, scale: float | None, softcap: float | None, dropout_p: float,
    fast_backward: bool, needed: list[bool],
) -> list[Tensor]:  # fmt: skip
    """fast_backward: see fast_attention_backward."""
    fast = fast_backward and not torch.are_deterministic_algorithms_enabled()
    attention = mask, key_lengths, offsets, seed, causal, offset, window, scale, softcap, dropout_p
    precision = torch.get_float32_matmul_precision()
    return _launch_backward(dout, query, key, value, out, lse, *attention, fast, tuple(needed), precision)


@gradients.register_fake
def _(dout, query, key, value, *_):
    return [empty_like_rows(t, t.shape[3]) for t in (query, key, value)]
