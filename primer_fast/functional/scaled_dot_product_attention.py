"""Differentiable softmax attention: checks and views here, math in kernels/scaled_dot_product_attention.py."""

__all__ = ["fast_attention_backward", "scaled_dot_product_attention", "scaled_dot_product_attention_plain"]

import math

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as torchs_attention  # primer_fast.sdpa moves the name

from primer_fast.backend import (
    autocast,
    autocast_dtype,
    jit_traces,
    prepares,
    runs_triton,
    sharded,
    sums_narrowly,
    tangents,
    wants_gradient,
)
from primer_fast.functional.attention_operator import NO_SOFTCAP, Attention, forward, gradients, launch
from primer_fast.functional.checks import check_alike, check_tensors
from primer_fast.functional.operator import differentiable, differentiates, gradients_of, needs_operator

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_fast_backward = False


class fast_attention_backward:  # as torch.set_grad_enabled
    """Allow attention's one-pass backward from here on, or in a ``with`` block, for what is computed forward there.

    It multiplies five times for each pair of blocks where the other multiplies seven times, but adds to the gradient of
    ``query`` in the order in which programs come: two runs differ in last bits. Taken on GPUs with a tensor memory
    accelerator, for 16-bit inputs with heads to 128, causal or without any mask, without softcap and dropout, where all
    gradients are asked for, and where it is predicted to be faster: with heads to 64, and with grouped heads to 128.
    Never under ``torch.use_deterministic_algorithms(True)``.
    """

    def __init__(self, enabled: bool = True):
        global _fast_backward
        self.before, _fast_backward = _fast_backward, enabled

    def __enter__(self):
        return self

    def __exit__(self, *_):
        global _fast_backward
        _fast_backward = self.before


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
    """``softmax(query @ key^T * scale + mask) @ value`` in tiles that stay on the chip.

    float32, float16 and bfloat16 with head dimensions to 256 run in Triton on a GPU, in any strides, without copies
    while the last axis is contiguous; the output lies in memory as ``query`` does. Float32 products follow
    ``torch.get_float32_matmul_precision()``. Other tensors, and gradients that are themselves differentiated, take
    PyTorch's operators. Softmax and sums are in float32; two runs are bitwise equal, backward included. Blocks of keys
    that causality, the window or the lengths rule out are skipped. Queries that see no key give 0. Nothing waits for
    the GPU: ``key_lengths`` and ``causal_offset`` are read there. A few queries against many keys, where no gradient is
    needed, as in generation from a cache, share the keys out over the whole GPU.

    Args:
        attn_mask: besides all other masks, ``is_causal`` too. It gets no gradient. Unless its rows begin at multiples
            of 16 elements and have a multiple of 16, it is copied once forward and once backward; axes that are
            expanded are not.
        dropout_p: probability to drop a weight, whatever the mode of a module; the others are scaled up. Drawn from
            torch's generator once per call, and computed again in the backward.
        is_causal: query i sees keys j <= i + causal_offset (0 if None: torch's top-left rule). A causal_offset implies
            is_causal; S - T is the bottom-right rule.
        scale: None: 1 / sqrt(D).
        enable_gqa: Hk may divide H: each key head serves H / Hk query heads that follow one another.
        window: w: of those, only j > i + causal_offset - w; without causality |i - j| < w.
        softcap: c: scores become c tanh(score / c), before masks.
        key_lengths: memory past them, NaN included, has no influence on the kernels' result.

    Raises:
        ValueError: shapes or devices do not match; an option is out of its range.
        TypeError: an argument is not a tensor, dtypes differ, or a mask or a length has the wrong one.
        NotImplementedError: ``attn_mask`` requires a gradient.

    Source: Vaswani et al., Attention Is All You Need (2017), equation 1; Dao, FlashAttention-2 (2023).
    """
    if prepares(query) and (attn_mask is None or not wants_gradient(attn_mask)):
        query, key, value, attn_mask = autocast(query, key, value, attn_mask)
        keep = wants_gradient(query, key, value)
        try:
            attention = _attention(attn_mask, dropout_p, is_causal, scale, window, softcap, key_lengths, causal_offset)
            plan = _plan(query, key, value, attention, enable_gqa, keep)
        except (TypeError, ValueError):  # a number that is none: checked below
            plan = None
        if plan is not None:
            return _run(plan, query, key, value, attention, keep)
    if isinstance(query, Tensor) and not runs_triton(query) and not sharded(query):
        simple = (
            attn_mask is None and dropout_p == 0
            and window is None and softcap is None and key_lengths is None and causal_offset is None
        )  # fmt: skip
        traced = jit_traces()  # its sizes are tensors
        empty = not traced and any(isinstance(t, Tensor) and 0 in t.shape for t in (query, key, value))
        if empty or not (simple or traced):  # torch, and the formula, would take more than is right
            _check_as_cast(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
                window, softcap, key_lengths, causal_offset,
            )  # fmt: skip
        try:
            return scaled_dot_product_attention_plain(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
                window=window, softcap=softcap, key_lengths=key_lengths, causal_offset=causal_offset,
            )  # fmt: skip
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):  # a short call costs less than checks
            _check_as_cast(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
                window, softcap, key_lengths, causal_offset,
            )  # fmt: skip
            raise
    query, key, value, attn_mask = autocast(query, key, value, attn_mask)
    options = {
        "attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale,
        "enable_gqa": enable_gqa, "window": window, "softcap": softcap, "key_lengths": key_lengths,
        "causal_offset": causal_offset,
    }  # fmt: skip
    lead, H = _check(query, key, value, **options)
    if attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(
            "scaled_dot_product_attention: attn_mask gets no gradient from the kernels; use "
            "torch.nn.functional.scaled_dot_product_attention, or attn_mask.detach()"
        )
    if not query.dim() == key.dim() == value.dim():
        axes = max(query.dim(), key.dim(), value.dim())
        query, key, value = (t.view(*(1,) * (axes - t.dim()), *t.shape) for t in (query, key, value))
    T, S, D = query.shape[-2], key.shape[-2], query.shape[-1]
    if max(D, value.shape[-1]) > 256 or D == 0:
        return scaled_dot_product_attention_plain(query, key, value, **options)

    heads_kv = max(math.prod(key.shape[-3:-2]), math.prod(value.shape[-3:-2]))
    q = _four_axes(query, lead, H)
    k, v = (_four_axes(t, lead, heads_kv) for t in (key, value))
    traced = needs_operator(
        q, k, v, attn_mask, key_lengths, causal_offset if isinstance(causal_offset, Tensor) else None
    )
    if attn_mask is not None and (traced or query.dim() != 4):
        attn_mask = attn_mask.expand(*lead, *(H, T, S)[3 - min(3, query.dim()) :]).reshape(len(q), H, T, S)
    attention = _attention(attn_mask, dropout_p, is_causal, scale, window, softcap, key_lengths, causal_offset)
    keep = wants_gradient(q, k, v)
    if sharded(q):
        from primer_fast.functional import shards

        def run(q, k, v, mask, lengths, offsets):
            return scaled_dot_product_attention(
                q, k, v, mask, dropout_p, is_causal, scale, enable_gqa, window=window, softcap=softcap,
                key_lengths=lengths, causal_offset=causal_offset if offsets is None else offsets,
            )  # fmt: skip

        out = shards.attention(run, q, k, v, attn_mask, key_lengths, attention.offsets, dropout_p)
        if out is None:
            return scaled_dot_product_attention_plain(query, key, value, **options)
    elif traced:
        if dropout_p > 0:
            attention = attention._replace(seed=torch.randint(2**62, (1,), device=q.device))
        out = _call(keep, q, k, v, *attention, _fast_backward, keep)
    else:
        rest = *attention[_TENSORS:], keep, torch.get_float32_matmul_precision()
        out = _run(lambda *tensors: launch(*tensors, *rest), q, k, v, attention, keep)
    return _as_asked(out, query, lead)


def _attention(mask, dropout_p, is_causal, scale, window, softcap, key_lengths, causal_offset) -> Attention:
    """The options as the kernels' launchers take them."""
    offset, offsets = (0, causal_offset) if isinstance(causal_offset, Tensor) else (causal_offset or 0, None)
    return Attention(
        mask, key_lengths, offsets, None, is_causal or causal_offset is not None, offset, window,
        scale if scale is None else float(scale), softcap if softcap is None else float(softcap), float(dropout_p),
    )  # fmt: skip


def _plan(query, key, value, attention, enable_gqa, keep):
    """The plan for a call as it is, whose heads, if they are grouped, may be; or None."""
    precision = torch.get_float32_matmul_precision()
    plan = launch.known(query, key, value, *attention, keep, precision)
    return plan if plan is None or enable_gqa or query.shape[1] == key.shape[1] else None


def _run(run, q, k, v, attention, keep):
    if keep:
        return _apply(q, k, v, (*attention, _fast_backward, keep), run)
    return run(q, k, v, *attention[:_TENSORS])[0]


def _setup(ctx, inputs, output):
    q, k, v, mask, key_lengths, offsets, seed, *ctx.numbers, _ = inputs
    if len(output) > 2 and seed is None:
        seed = output[2]  # drawn by the launcher
    ctx.save_for_backward(q, k, v, output[0], output[1], mask, key_lengths, offsets, seed)


def _backward(ctx, dout):
    q, k, v, out, lse, *of_attention = ctx.saved_tensors
    needed = ctx.needs_input_grad[:3]
    if not differentiates(dout):
        return gradients(dout, q, k, v, out, lse, *of_attention, *ctx.numbers, needed)
    attention = Attention(*of_attention, *ctx.numbers[:-1])
    if attention.dropout_p > 0:
        raise NotImplementedError(
            "scaled_dot_product_attention: gradients of gradients are not built with dropout; set dropout_p=0 or use "
            "scaled_dot_product_attention_plain"
        )
    offset = (attention.offset if attention.offsets is None else attention.offsets) if attention.causal else None

    def plain():
        return scaled_dot_product_attention_plain(
            q, k, v, attention.mask, scale=attention.scale, enable_gqa=q.shape[1] != k.shape[1],
            window=attention.window, softcap=attention.softcap, key_lengths=attention.key_lengths, causal_offset=offset,
        )  # fmt: skip

    with sdpa_kernel(SDPBackend.MATH):
        return gradients_of(plain, (q, k, v), needed, dout)


_call, _apply = differentiable(forward, _setup, _backward, leading=3)
_TENSORS = 4  # of Attention's fields, which come first


def _as_asked(out, query, lead):
    """(B, H, T, DV) -> with the axes of ``query``."""
    if query.dim() == 4:
        return out
    return out[0, 0] if query.dim() == 2 else out.view(*lead, *out.shape[1:])


def _four_axes(t, lead, heads):
    """(..., h, rows, d) -> (B, heads, rows, d), leading axes as one."""
    if t.dim() != 4 or t.shape[:2] != (*lead, heads):
        t = t.expand(*lead, *((heads,) if t.dim() > 2 else ()), *t.shape[-2:])
        t = t.reshape(math.prod(lead), heads, *t.shape[-2:])
    return t


def scaled_dot_product_attention_plain(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False,
    *, window=None, softcap=None, key_lengths=None, causal_offset=None,
):  # fmt: skip
    """The same through torch's own operators."""
    narrow = sums_narrowly(key) or sums_narrowly(value)  # which counts where heads share a key
    if enable_gqa and (narrow or not _groups_as_torch_has_them(query, key, value)):
        key, value = _repeated(query, key, value)
        enable_gqa = False
    # Of empty tensors torch's result has not always the right shape.
    empty = not jit_traces() and any(0 in t.shape[:-1] for t in (query, key, value))
    if (
        (attn_mask is None or not is_causal) and not empty
        and window is None and softcap is None and key_lengths is None and causal_offset is None
    ):  # fmt: skip
        attend = _with_tangents if tangents() else torchs_attention
        return attend(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    visible = _visible(query, key.shape[-2], is_causal, window, key_lengths, causal_offset)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        visible = attn_mask if visible is None else visible & attn_mask
        attn_mask = None
    if softcap is None and not empty:
        mask = visible
        if attn_mask is not None:
            mask = attn_mask if visible is None else attn_mask.masked_fill(~visible, -math.inf)
        attend = _with_tangents if tangents() else torchs_attention
        return attend(query, key, value, mask, dropout_p, scale=scale, enable_gqa=enable_gqa)
    if enable_gqa:
        key, value = _repeated(query, key, value)
    dtype = autocast_dtype(query) or query.dtype
    wide = torch.promote_types(dtype, torch.float32)  # of scores and sums, as in the kernels
    query, key, value = (t.to(wide) for t in (query, key, value))
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if softcap is not None and softcap < NO_SOFTCAP:
        scores = softcap * torch.tanh(scores / softcap)
    if attn_mask is not None:
        scores = scores + attn_mask
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    empty = (scores == -math.inf).all(dim=-1, keepdim=True)
    weights = scores.masked_fill(empty, 0).softmax(dim=-1).masked_fill(empty, 0)  # 0 before, lest gradients be NaN
    return (torch.dropout(weights, dropout_p, True) @ value).to(dtype)


def _with_tangents(*args, **options):
    """torch's attention that has a forward derivative; the others have none."""
    with sdpa_kernel(SDPBackend.MATH):
        return torchs_attention(*args, **options)


def _groups_as_torch_has_them(query, key, value):
    if not query.dim() == key.dim() == value.dim() > 2:
        return False
    heads = key.shape[-3]
    return heads == value.shape[-3] > 0 and query.shape[-3] % heads == 0 and query.shape[-3] > 0


def _repeated(query, key, value):
    """Key and value with as many heads as query, or as each other where query has one, or none where it has no axis."""
    if max(key.dim(), value.dim()) < 3:
        return key, value
    groups = max(query.shape[-3:-2].numel() // max(key.shape[-3:-2].numel(), value.shape[-3:-2].numel(), 1), 1)
    heads = max(t.shape[-3] for t in (key, value) if t.dim() > 2)
    pair = (t if t.dim() < 3 else t.expand(*t.shape[:-3], heads, *t.shape[-2:]) for t in (key, value))
    return tuple(t if t.dim() < 3 else _repeat_interleave(t, groups) for t in pair)


def _repeat_interleave(t, groups):
    if not sums_narrowly(t):
        return t.repeat_interleave(groups, -3)
    return t.float().repeat_interleave(groups, -3).to(t.dtype)


def _visible(query, S, is_causal, window, key_lengths, causal_offset):
    """Which keys each query sees: bool that broadcasts to (..., H, T, S), or None for all."""
    device = query.device
    per_batch = (*query.shape[:-3], *(1,) * min(3, query.dim()))

    def spread(numbers):
        numbers = numbers.to(device)
        return numbers.view(()) if numbers.numel() == 1 else numbers.view(per_batch)

    i, j = torch.arange(query.shape[-2], device=device)[:, None], torch.arange(S, device=device)
    visible = None
    if causal_offset is not None:
        i = i + (spread(causal_offset) if isinstance(causal_offset, Tensor) else causal_offset)
    if is_causal or causal_offset is not None:
        visible = j <= i
        if window is not None:
            visible = visible & (j > i - window)
    elif window is not None:
        visible = (i - j).abs() < window
    if key_lengths is not None:
        inside = j < spread(key_lengths)
        visible = inside if visible is None else visible & inside
    return visible[None] if visible is not None and visible.dim() == 1 else visible  # a mask has two axes at least


def _check_as_cast(query, key, value, attn_mask, *options):
    """``_check`` of what torch will compute on: under autocast, the tensors in its dtype."""
    _check(*autocast(query, key, value, attn_mask), *options)


def _check(
    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, window, softcap, key_lengths, causal_offset
):
    """-> leading axes of the result, its number of heads (1 where there is no such axis)."""

    def wrong(kind, what, got):
        return kind(f"scaled_dot_product_attention: {what}; got {got}")

    inputs = {"query": query, "key": key, "value": value}
    check_tensors("scaled_dot_product_attention", inputs)
    check_alike("scaled_dot_product_attention", inputs)
    if not query.is_floating_point():
        raise wrong(TypeError, "query must be floating", query.dtype)

    def shapes():
        return f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"

    dims = [t.dim() for t in inputs.values()]
    if min(dims) < 2 or query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        raise wrong(ValueError, "query must be (..., H, T, D), key (..., Hk, S, D), value (..., Hk, S, Dv)", shapes())
    heads, heads_k, heads_v = (math.prod(t.shape[-3:-2]) for t in inputs.values())
    try:
        lead = query.shape[:-3]
        if not lead == key.shape[:-3] == value.shape[:-3]:
            lead = torch.broadcast_shapes(lead, key.shape[:-3], value.shape[:-3])
        heads_kv = heads_k if heads_v == 1 else heads_v if heads_k == 1 else heads_k
        if heads_v not in (1, heads_kv) or heads_k not in (1, heads_kv):
            raise RuntimeError
        H = heads_kv if heads == 1 else heads
        if heads_kv not in (1, H) and (not enable_gqa or heads_kv == 0 or H % heads_kv):
            raise RuntimeError
    except RuntimeError:
        raise wrong(
            ValueError, "leading axes must broadcast, and heads too, or with enable_gqa Hk must divide H", shapes()
        ) from None
    T, S = query.shape[-2], key.shape[-2]
    scores = (*lead, H, T, S) if max(dims) > 2 else (T, S)
    if attn_mask is not None:
        if not isinstance(attn_mask, Tensor):
            raise wrong(TypeError, "attn_mask must be a tensor", type(attn_mask).__name__)
        if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
            taken = " or ".join(dict.fromkeys(map(str, (torch.bool, torch.float32, query.dtype))))
            raise wrong(TypeError, f"attn_mask must be {taken}", attn_mask.dtype)
        if attn_mask.device != query.device:
            raise wrong(ValueError, "attn_mask must be on the device of query", attn_mask.device)
        fits = attn_mask.dim() <= len(scores) and all(
            a in (1, b) for a, b in zip(reversed(attn_mask.shape), reversed(scores), strict=False)
        )  # fmt: skip
        if not fits:
            raise wrong(ValueError, f"attn_mask must broadcast to {tuple(scores)}", tuple(attn_mask.shape))
    B = math.prod(lead)
    for name, t in (("key_lengths", key_lengths), ("causal_offset", causal_offset)):
        if isinstance(t, Tensor):
            if t.dtype not in _INTEGERS:
                raise wrong(TypeError, f"{name} must hold integers", t.dtype)
            if t.numel() != B and (t.numel() != 1 or name == "key_lengths"):
                raise wrong(ValueError, f"{name} must have one element per batch element, {B}", tuple(t.shape))
            if t.device != query.device:
                raise wrong(ValueError, f"{name} must be on the device of query", t.device)
        elif t is not None and (name == "key_lengths" or type(t) is not int):
            raise wrong(TypeError, f"{name} must be an integer tensor{' or an int' * (name != 'key_lengths')}", repr(t))
    if scale is not None and not hasattr(scale, "__float__"):
        raise wrong(TypeError, "scale must be a number or None", repr(scale))
    for name, number in (("softcap", softcap), ("dropout_p", dropout_p)):
        if not isinstance(number, int | float) and (number is not None or name == "dropout_p"):
            raise wrong(TypeError, f"{name} must be a number", repr(number))
    if window is not None and (type(window) is not int or window < 1):
        raise wrong(ValueError, "window must be an integer of at least 1", repr(window))
    if softcap is not None and not softcap > 0:
        raise wrong(ValueError, "softcap must be positive", softcap)
    if not 0 <= dropout_p <= 1:
        raise wrong(ValueError, "dropout_p must be between 0 and 1", dropout_p)
    return lead, H
