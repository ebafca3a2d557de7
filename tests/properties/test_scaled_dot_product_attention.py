import math

import torch
from hypothesis import strategies as st
from properties.calls import FLOATS, explores, near, one_not_a_tensor, rarely, tensors


@st.composite
def calls(draw, path):
    size = st.sampled_from((1, 2, 3, 5, 0, 17, 33) if path == "plain" else (1, 2, 3, 5, 0, 17))
    T, S, D, DV = draw(size), draw(size), draw(st.sampled_from([1, 3, 8, 16, 17])), draw(st.sampled_from([1, 5, 16]))
    heads, shared = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    axes = draw(st.sampled_from([4, 4, 4, 3, 2, 5]))
    batch = draw(st.integers(0 if path == "plain" else 1, 2))
    lead = {2: (), 3: (), 4: (batch,), 5: (batch, 2)}[axes]
    of_query, of_key = ((*lead, heads * shared), (*lead, heads)) if axes > 2 else ((), ())
    dtype = draw(st.sampled_from(FLOATS[path]))
    count = math.prod(lead)
    arguments = {
        "query": draw(tensors((*of_query, T, D), dtype)),
        "key": draw(tensors(near(draw, (*of_key, S, D)), rarely(draw, dtype, torch.float32))),
        "value": draw(tensors(near(draw, (*of_key, S, DV)), rarely(draw, dtype, torch.float32))),
        "attn_mask": None,
        "dropout_p": rarely(draw, 0.0, 0, -0.1, 1.5, "x"),
        "is_causal": draw(st.booleans()),
        "scale": rarely(draw, draw(st.sampled_from([None, 0.5, 1, 0.0])), "x", [1.0]),
        "enable_gqa": rarely(draw, shared > 1, not shared > 1),
        "window": None, "softcap": None, "key_lengths": None, "causal_offset": None,
    }  # fmt: skip
    if draw(st.integers(0, 3)) == 0:
        mask = draw(st.sampled_from([(T, S), (1, S), (T, 1), (*of_query, T, S), (*(1,) * len(of_query), T, S)]))
        kind = rarely(draw, draw(st.sampled_from([torch.bool, dtype])), torch.int64, torch.float16)
        arguments["attn_mask"] = draw(
            tensors(near(draw, mask), kind, (0, 2) if kind == torch.bool else "normal", False)
        )
    if draw(st.integers(0, 3)) == 0:
        arguments["window"] = rarely(draw, draw(st.integers(1, 9)), 0, -1, 2.0, True, "x")
    if draw(st.integers(0, 3)) == 0:
        arguments["softcap"] = rarely(draw, draw(st.sampled_from([1.5, 20.0, 3])), 0, -1.0, "x", math.nan)
    if draw(st.integers(0, 3)) == 0:
        of_lengths = tensors(
            near(draw, (count,)), rarely(draw, torch.int64, torch.int32, torch.float32), (0, S + 2), False
        )
        arguments["key_lengths"] = rarely(draw, draw(of_lengths), 2, [2])
    if draw(st.integers(0, 3)) == 0:
        of_offsets = tensors(draw(st.sampled_from([(count,), ()])), torch.int64, (-3, 4), False)
        arguments["causal_offset"] = rarely(draw, draw(st.one_of(st.integers(-3, 20), of_offsets)), 1.0, True, "x", [1])
    return one_not_a_tensor(draw, arguments, "query", "key", "value", "attn_mask")


def reference(
    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, window, softcap, key_lengths, causal_offset
):
    """The definition; torch's own function refuses what it does not take."""
    if not (query.dtype == key.dtype == value.dtype) or not (attn_mask is None or attn_mask.device == query.device):
        raise TypeError("dtypes")
    for options in (window, causal_offset):
        if isinstance(options, bool | float | str | list):
            raise TypeError("an integer")
    if (window is not None and window < 1) or (softcap is not None and not softcap > 0) or not 0 <= dropout_p <= 1:
        raise ValueError("range")
    if isinstance(key_lengths, int | list) or (key_lengths is not None and key_lengths.is_floating_point()):
        raise TypeError("key_lengths")
    of_torch = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask, 0.0, is_causal and attn_mask is None, scale=scale,
        enable_gqa=enable_gqa and query.dim() > 2,
    )  # fmt: skip
    del of_torch
    count = math.prod(torch.broadcast_shapes(*(t.shape[:-3] for t in (query, key, value))))
    for numbers in (key_lengths, causal_offset):
        if isinstance(numbers, torch.Tensor) and numbers.numel() not in (
            (count,) if numbers is key_lengths else (1, count)
        ):
            raise ValueError("one a sequence")
    q, k, v = query, key, value
    if enable_gqa and q.dim() > 2:
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    scores = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    T, S = scores.shape[-2:]
    i, j = torch.arange(T, device=q.device)[:, None], torch.arange(S, device=q.device)
    visible = torch.ones(T, S, dtype=torch.bool, device=q.device)
    if causal_offset is not None:
        offset = (
            causal_offset if isinstance(causal_offset, int) or causal_offset.numel() == 1 else spread(causal_offset, q)
        )
        i = i + (offset.reshape(()) if isinstance(offset, torch.Tensor) and offset.numel() == 1 else offset)
    causal = is_causal or causal_offset is not None
    if causal:
        visible = j <= i
    if window is not None:
        visible = visible & ((j > i - window) if causal else ((i - j).abs() < window))
    if key_lengths is not None:
        visible = visible & (j < spread(key_lengths, q))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        visible = visible & attn_mask
    elif attn_mask is not None:
        scores = scores + attn_mask.to(scores.dtype)
    scores = scores.masked_fill(~visible, -math.inf)
    empty = (scores == -math.inf).all(dim=-1, keepdim=True)
    weights = scores.masked_fill(empty, 0).softmax(dim=-1).masked_fill(empty, 0)
    return weights @ v


def spread(numbers, q):
    if numbers.numel() == 1:
        return numbers.reshape(())
    return numbers.reshape(*((-1,) if q.dim() == 4 else q.shape[:-3]), 1, 1, 1)


REFUSED = ["leading axes must broadcast, and heads too"]  # torch takes other heads of value than of key
BEYOND = ["Dimension out of range"]  # torch wants an axis of heads for enable_gqa
test_any_call = explores("scaled_dot_product_attention", calls, reference, refused=REFUSED, beyond=BEYOND)
