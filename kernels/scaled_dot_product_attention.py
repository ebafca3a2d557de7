"""Softmax attention in tiles that stay on the chip: scores are never in memory.

    s = q k^T scale (+ softcap: c tanh(s / c)) + mask       p = softmax(s)       out = dropout(p) v

    p = exp(s - lse)            dv = p^T dout               dp = dout v^T        delta = row sums of dout * out
    ds = p (dp - delta)         dq = ds k scale             dk = ds^T q scale

q (B, H, T, D), k (B, HK, S, D), v (B, HK, S, DV): H / HK query heads share a key head. The parts:

    attention/mask.py       which keys a query sees, and which blocks a tile skips; dropout's choice
    attention/tile.py       tiles of rows by descriptor or pointer, scores, layouts
    attention/settings.py   how the kernels are cut up
    attention/forward.py    one pass over the keys with a running softmax; saves out and lse
    attention/backward.py   delta, then dk and dv per tile of keys, then dq per tile of queries
    attention/onepass.py    the backward in one pass, for those who do without bitwise equal runs
    attention/decode.py     few queries, many keys, no gradient: the keys are split over programs

FLOPs: forward 4 B H T S D (half of it under a causal mask), backward 2.5 times that as the field counts it; the two
backward kernels spend 7 products where one pass would spend 5, and in return no sum depends on the order of programs.
Traffic: q, k, v, out once each and 4 B H T bytes of lse, while keys and values of the heads at work stay in L2.
Source: Dao, FlashAttention-2 (2023); Milakov and Gimelshein, Online normalizer calculation for softmax (2018).
"""

from .attention.backward import attention_backward
from .attention.forward import attention_forward
from .attention.mask import Band
from .attention.settings import AttentionSettings, BackwardSettings
from .attention.tile import Scoring

__all__ = ["AttentionSettings", "BackwardSettings", "Band", "Scoring", "attention_backward", "attention_forward"]
