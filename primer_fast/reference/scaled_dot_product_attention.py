"""Softmax attention with everything that can stand between a score and its weight.

Legend: B batch, H query heads, HK key heads, T queries, S keys, D and DV head dimensions of keys and values.
"""

__all__ = [
    "CASES",
    "DRAWN",
    "REFERENCE",
    "bytes_moved",
    "flops",
    "scaled_dot_product_attention",
    "scaled_dot_product_attention_grad",
    "scaled_dot_product_attention_magnitude",
    "sizes",
    "values",
    "visible",
    "weights",
]

import math

import numpy as np

from primer_fast.reference.case import Case, Reference


def _spread(numbers, ndim):
    """One number, or one per batch element, against (B, H, T, S) or (H, T, S)."""
    numbers = np.asarray(numbers)
    return numbers.reshape(-1, *(1,) * 3) if numbers.size > 1 and ndim == 4 else numbers.reshape(())


def visible(shape, is_causal=False, window=None, key_lengths=None, causal_offset=None):
    """(..., T, S) of bool: query i sees key j."""
    i, j = np.arange(shape[-2])[:, None], np.arange(shape[-1])
    seen = np.ones(shape, dtype=bool)
    if causal_offset is not None:
        i = i + _spread(causal_offset, len(shape))
    if is_causal or causal_offset is not None:
        seen &= j <= i
        if window is not None:
            seen &= j > i - window
    elif window is not None:
        seen &= np.abs(i - j) < window
    if key_lengths is not None:
        seen &= j < _spread(key_lengths, len(shape))
    return seen


def _repeat(query, *others):
    """Key heads as often as query heads: each serves its group of neighbours."""
    return [np.repeat(t, query.shape[-3] // t.shape[-3], axis=-3) for t in others]


def _group_sum(grad, heads):
    """(..., H, S, d) -> (..., HK, S, d)"""
    return grad.reshape(*grad.shape[:-3], heads, grad.shape[-3] // heads, *grad.shape[-2:]).sum(axis=-3)


def weights(query, key, attn_mask=None, scale=None, softcap=None, **positions):
    """-> softmax (..., H, T, S), 0 in rows that see nothing, and the slope of the softcap."""
    (key,) = _repeat(query, key)
    scores = query @ key.swapaxes(-1, -2) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    slope = 1.0
    if softcap is not None:
        bounded = np.tanh(scores / softcap)
        scores, slope = softcap * bounded, 1 - bounded**2
    if attn_mask is not None:
        scores = np.where(attn_mask, scores, -np.inf) if attn_mask.dtype == bool else scores + attn_mask
    scores = np.where(visible(scores.shape, **positions), scores, -np.inf)
    top = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    p = np.exp(scores - np.where(top == -np.inf, 0, top))
    total = p.sum(axis=-1, keepdims=True)
    return p / np.where(total == 0, 1, total), slope


def scaled_dot_product_attention(
    query, key, value, attn_mask=None, is_causal=False, scale=None, enable_gqa=False,
    *, window=None, softcap=None, key_lengths=None, causal_offset=None,
):  # fmt: skip
    """query (..., H, T, D), key (..., HK, S, D), value (..., HK, S, DV) -> (..., H, T, DV)."""
    p, _ = weights(
        query, key, attn_mask, scale, softcap,
        is_causal=is_causal, window=window, key_lengths=key_lengths, causal_offset=causal_offset,
    )  # fmt: skip
    return p @ _repeat(query, value)[0]


def scaled_dot_product_attention_grad(
    dy, query, key, value, attn_mask=None, is_causal=False, scale=None, enable_gqa=False, *, softcap=None, **positions
):
    """dy (..., H, T, DV) and the forward's arguments -> gradients of query, key and value by name.

    positions: window, key_lengths and causal_offset, as of the forward.
    """
    p, slope = weights(query, key, attn_mask, scale, softcap, is_causal=is_causal, **positions)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    wide_key, wide_value = _repeat(query, key, value)
    dp = dy @ wide_value.swapaxes(-1, -2)
    ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True)) * slope * scale
    heads = key.shape[-3]
    return {
        "query": ds @ wide_key,
        "key": _group_sum(ds.swapaxes(-1, -2) @ query, heads),
        "value": _group_sum(p.swapaxes(-1, -2) @ dy, heads),
    }


def scaled_dot_product_attention_magnitude(
    dy, query, key, value, attn_mask=None, is_causal=False, scale=None, enable_gqa=False, *, softcap=None, **positions
):
    """What a float32's rounding is relative to, by result: sums of absolute products, where those of a score count
    once more, since an exponential turns their absolute error into a relative one."""
    p, _ = weights(query, key, attn_mask, scale, softcap, is_causal=is_causal, **positions)
    scale = abs(1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    q, g = np.abs(query), np.abs(dy)
    k, v = (np.abs(t) for t in _repeat(query, key, value))
    p = p * (1 + q @ k.swapaxes(-1, -2) * scale)
    dp = g @ v.swapaxes(-1, -2)
    ds = p * (dp + (p * dp).sum(axis=-1, keepdims=True)) * scale
    heads = key.shape[-3]
    sums = {
        "output": p @ v,
        "query": ds @ k,
        "key": _group_sum(ds.swapaxes(-1, -2) @ q, heads),
        "value": _group_sum(p.swapaxes(-1, -2) @ g, heads),
    }
    return {name: float(a.max(initial=0.0)) for name, a in sums.items()}


def sizes(case):
    """Case -> (B, H, HK, T, S, D, DV)."""
    *lead, H, T, D = case.shapes["query"]
    HK, S, DV = case.shapes["value"][-3:]
    return math.prod(lead), H, HK, T, S, D, DV


def flops(case):
    """Floating-point operations by pass, as the field counts: two products of T x S forward, five backward, half of
    that under a causal mask; a window counts the keys that it leaves."""
    B, H, _, T, S, D, DV = sizes(case)
    seen = T * S / 2 if case.options.get("is_causal") else T * S
    window = case.options.get("window")
    if window is not None:
        seen = min(seen, T * window if case.options.get("is_causal") else T * (2 * window - 1))
    product = int(2 * B * H * seen * (D + DV) / 2)
    return {"forward": 2 * product, "backward": 5 * product}


def bytes_moved(case, itemsize):
    """Fewest bytes to move by pass: every array read once, every result written once, and lse in float32.

    The backward reads dy, query, key, value, the output and lse, which is two numbers where a mask is added.
    """
    B, H, HK, T, S, D, DV = sizes(case)
    queries, keys, outputs, lse = B * H * T * D, B * HK * S * (D + DV), B * H * T * DV, 4 * B * H * T
    mask = 0
    if "attn_mask" in case.shapes:
        mask = math.prod(case.shapes["attn_mask"]) * itemsize
        if "attn_mask" not in case.dtypes:  # one that is added: lse in two parts
            lse *= 2
    return {
        "forward": itemsize * (queries + keys + outputs) + lse + mask,
        "backward": itemsize * (2 * queries + 2 * keys + 2 * outputs) + lse + mask,
    }


def values(case, rng):
    """Inputs that are not plain normal: lengths, offsets and masks."""
    B, _, _, T, S, *_ = sizes(case)
    made = {}
    if "key_lengths" in case.shapes:  # 0, S and something between
        lengths = rng.integers(0, S + 1, size=case.shapes["key_lengths"])
        lengths[: min(2, B)] = (0, S)[: min(2, B)]
        made["key_lengths"] = lengths
    if "causal_offset" in case.shapes:
        offsets = rng.integers(-T // 2, S, size=case.shapes["causal_offset"])
        offsets.reshape(-1)[0] = S - T
        made["causal_offset"] = offsets
    if case.dtypes.get("attn_mask") == "bool":
        mask = rng.random(case.shapes["attn_mask"]) < 0.7
        mask[..., T // 2 : T // 2 + 2, :] &= mask.shape[-2] == 1  # queries that see nothing
        made["attn_mask"] = mask
    elif "attn_mask" in case.shapes:
        mask = rng.normal(size=case.shapes["attn_mask"])
        made["attn_mask"] = np.where(rng.random(mask.shape) < 0.2, -np.inf, mask)
    return made


def _case(name, why, B, H, T, D, S=None, HK=None, DV=None, *, mask=None, mask_dtype=None, lengths=False, offsets=None,
          layouts=None, production=False, gradients=True, **options):  # fmt: skip
    S, HK, DV = T if S is None else S, HK or H, DV or D
    shapes: dict[str, tuple[int, ...]] = {"query": (B, H, T, D), "key": (B, HK, S, D), "value": (B, HK, S, DV)}
    dtypes = {}
    if mask is not None:
        shapes["attn_mask"] = mask
        if mask_dtype:
            dtypes["attn_mask"] = mask_dtype
    if lengths:
        shapes["key_lengths"], dtypes["key_lengths"] = (B,), "int64"
    if offsets is not None:
        shapes["causal_offset"], dtypes["causal_offset"] = offsets, "int64"
    if HK != H:
        options["enable_gqa"] = True
    return Case(name, why, shapes, options, layouts or {}, production, dtypes, gradients)


_ALL = ("query", "key", "value")


CASES = (
    _case("small", "everything in one tile", 2, 2, 20, 16),
    _case("one_query", "T = 1", 1, 2, 1, 32, S=70),
    _case("one_key", "S = 1: every weight is 1", 1, 2, 33, 16, S=1),
    _case("one", "every size 1", 1, 1, 1, 1),
    _case("no_batch", "empty batch", 0, 2, 8, 16),
    _case("no_queries", "T = 0", 1, 2, 0, 16, S=8),
    _case("no_keys", "S = 0: the output is 0", 1, 2, 8, 16, S=0),
    _case("long_keys", "several tiles of keys, an edge inside the last", 1, 1, 40, 16, S=200),
    _case("long_queries", "several tiles of queries, an edge inside the last", 1, 1, 200, 16, S=40),
    _case("exact_tiles", "sizes that tiles divide", 1, 1, 128, 64),
    _case("head_40", "a head that no power of two divides", 1, 1, 70, 40),
    _case("head_80", "the same past 64", 1, 1, 70, 80, is_causal=True),
    _case("head_odd", "a head whose rows no descriptor takes", 1, 1, 40, 19, is_causal=True),
    _case("head_128", "the common head of large models", 1, 1, 140, 128, is_causal=True),
    _case("head_256", "the widest head", 1, 1, 70, 256, is_causal=True),
    _case("wide_values", "values wider than keys", 1, 1, 40, 16, DV=72),
    _case("narrow_values", "values narrower than keys", 1, 1, 40, 64, DV=24, is_causal=True),
    _case("causal", "several tiles on the diagonal", 1, 1, 200, 16, is_causal=True),
    _case("causal_few_keys", "T > S under torch's top-left rule", 1, 1, 150, 16, S=70, is_causal=True),
    _case("causal_many_keys", "T < S under torch's top-left rule", 1, 1, 70, 16, S=200, is_causal=True),
    _case("offset_ahead", "T < S, bottom right", 1, 1, 70, 16, S=200, is_causal=True, causal_offset=130),
    _case("offset_behind", "T > S, bottom right: the first queries see nothing", 1, 1, 200, 16, S=70,
          causal_offset=-130),
    _case("offsets", "an offset for each batch element", 2, 1, 70, 16, S=150, offsets=(2,)),
    _case("offset_tensor", "one offset in memory", 2, 1, 70, 16, S=150, offsets=()),
    _case("window_causal", "tiles masked on both sides", 1, 1, 200, 16, is_causal=True, window=70),
    _case("window_one", "each query sees itself", 1, 1, 70, 16, is_causal=True, window=1),
    _case("window", "a window without a direction", 1, 1, 200, 16, window=40),
    _case("window_offsets", "a window that moves with the offsets", 2, 1, 70, 16, S=200, offsets=(2,), window=30),
    _case("softcap", "scores far into the cap", 1, 1, 70, 32, is_causal=True, softcap=1.5, scale=2.0),
    _case("lengths", "no key, all keys, some keys", 3, 1, 40, 16, S=150, lengths=True),
    _case("lengths_causal", "lengths, a diagonal and a window", 3, 1, 90, 16, lengths=True, is_causal=True,
          window=60),
    _case("mask", "bool, of queries and keys", 1, 2, 70, 16, S=90, mask=(70, 90), mask_dtype="bool"),
    _case("mask_of_keys", "bool, of a batch element's keys", 2, 1, 70, 16, S=90, mask=(2, 1, 1, 90),
          mask_dtype="bool", is_causal=True),
    _case("mask_of_all", "bool, of its own for each head", 2, 2, 40, 16, S=50, mask=(2, 2, 40, 50), mask_dtype="bool"),
    _case("bias", "floating, with -inf", 1, 2, 70, 16, S=90, mask=(2, 70, 90)),
    _case("bias_of_keys", "floating, one row for all", 1, 2, 70, 16, S=90, mask=(1, 1, 90), softcap=5.0),
    _case("grouped_2", "two query heads for each key head", 1, 4, 70, 16, HK=2, is_causal=True),
    _case("grouped_4", "one key head", 1, 4, 40, 16, S=90, HK=1),
    _case("negative_scale", "the largest product has the least weight", 1, 1, 70, 16, scale=-0.7),
    _case("large_scores", "weights near 0 and 1", 1, 1, 70, 64, scale=3.0),
    _case("heads_last", "heads after time in memory, as a projection leaves them", 2, 2, 40, 16,
          layouts=dict.fromkeys(_ALL, "heads_last"), is_causal=True),
    _case("transposed", "keys and values stored by column", 1, 1, 40, 16,
          layouts={"key": "transposed", "value": "transposed"}),
    _case("strided", "every second element", 1, 1, 40, 16, layouts=dict.fromkeys(_ALL, "strided")),
    _case("expanded", "keys and values of one batch element for all", 2, 2, 40, 16,
          layouts={"key": "expanded", "value": "expanded"}),
    _case("offset_memory", "arrays that start off a 16-byte boundary", 1, 1, 40, 16,
          layouts=dict.fromkeys(_ALL, "offset")),
    _case("llama_4k", "heads of 128, the common size of published figures", 4, 16, 4096, 128, is_causal=True,
          production=True),
    _case("llama_16k", "long", 1, 16, 16384, 128, is_causal=True, production=True),
    _case("full_4k", "without a mask: the share of the chip's peak", 4, 16, 4096, 128, production=True),
    _case("head_64_4k", "heads of 64", 4, 32, 4096, 64, is_causal=True, production=True),
    _case("gpt2", "GPT-2 124M, 16 x 1024 tokens", 16, 12, 1024, 64, is_causal=True,
          layouts=dict.fromkeys(_ALL, "heads_last"), production=True),
    _case("grouped_4k", "Llama 3 8B: 32 query heads, 8 key heads", 1, 32, 4096, 128, HK=8, is_causal=True,
          production=True),
    _case("window_16k", "a window of 1024", 1, 16, 16384, 128, is_causal=True, window=1024, production=True),
    _case("bert", "padded batch", 32, 12, 512, 64, lengths=True, production=True),
    _case("head_256_4k", "heads of 256", 2, 8, 4096, 256, is_causal=True, production=True),
    _case("head_80_2k", "heads of 80", 4, 16, 2048, 80, is_causal=True, production=True),
    _case("softcap_4k", "Gemma 2: softcap and window", 1, 16, 4096, 256, HK=8, is_causal=True, window=2048,
          softcap=50.0, production=True),
    _case("bias_1k", "a bias for each head", 4, 12, 1024, 64, mask=(12, 1024, 1024), production=True),
    _case("bias_lengths_512", "T5 base: a bias for each head, a padded batch", 32, 12, 512, 64, mask=(12, 512, 512),
          lengths=True, production=True),
    _case("bias_128_2k", "heads of 128 with a bias for each pair, causal", 2, 16, 2048, 128, mask=(2048, 2048),
          is_causal=True, production=True),
    _case("bias_72_729", "SigLIP so400m: 729 patches, heads of 72; a bias for each pair", 8, 16, 729, 72,
          mask=(8, 1, 729, 729), production=True),
    _case("softcap_72_2k", "softcap, a bool mask and lengths at once, heads of 72", 2, 16, 2048, 72,
          mask=(2, 1, 2048, 2048), mask_dtype="bool", lengths=True, softcap=30.0, production=True),
    _case("grouped_lengths_2k", "Llama 3 8B: a padded batch", 4, 32, 2048, 128, HK=8, lengths=True, is_causal=True,
          production=True),
    _case("decode_8k", "a token of Llama 3 8B: the bytes of its cache", 8, 32, 1, 128, S=8192, HK=8,
          gradients=False, production=True),
    _case("decode_32k", "the same, long", 8, 32, 1, 128, S=32768, HK=8, gradients=False, production=True),
    _case("decode_lengths", "GPT-2 124M, 64 sequences of different lengths", 64, 12, 1, 64, S=1024, lengths=True,
          gradients=False, production=True),
)  # fmt: skip

# Whose results are drawn: compiled like the production cases, compared with nothing.
DRAWN = (
    _case("dropout_2k", "heads of 128, dropout", 4, 16, 2048, 128, is_causal=True, dropout_p=0.1, production=True),
)  # fmt: skip

REFERENCE = Reference(
    "scaled_dot_product_attention",
    scaled_dot_product_attention,
    scaled_dot_product_attention_grad,
    scaled_dot_product_attention_magnitude,
    flops,
    bytes_moved,
    CASES,
    drawn=DRAWN,
    values=values,
    without_gradient=("attn_mask",),
)
