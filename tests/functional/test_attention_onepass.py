"""The one-pass backward by its launcher, against NumPy; what it serves and what it leaves to the deterministic one."""

import numpy as np
import pytest
import torch

from primer_fast.kernels.attention.onepass import attention_bwd_onepass, chosen, onepass_default, supported
from primer_fast.kernels.attention.settings import AttentionSettings
from primer_fast.kernels.device import assume_chip
from primer_fast.proof.numerics import exact, worst
from primer_fast.proof.verify import DTYPES
from primer_fast.reference.scaled_dot_product_attention import (
    scaled_dot_product_attention,
    scaled_dot_product_attention_grad,
)  # fmt: skip

SMALL = AttentionSettings(16, 32, 4, 2)


def truth(do, q, k, v, scale, causal, causal_offset):
    """float64 dq, dk, dv, and what the forward keeps: its output, lse in base 2."""
    options = {"scale": scale, "enable_gqa": True} | ({"causal_offset": causal_offset} if causal else {})
    scores = scale * q @ k.repeat(q.shape[1] // k.shape[1], axis=1).swapaxes(-1, -2)
    if causal:
        i, j = np.arange(q.shape[2])[:, None], np.arange(k.shape[2])
        scores = np.where(j <= i + causal_offset, scores, -np.inf)
    lse = np.logaddexp2.reduce(scores / np.log(2), axis=-1)
    grads = scaled_dot_product_attention_grad(do, q, k, v, **options)
    return [grads[name] for name in ("query", "key", "value")], scaled_dot_product_attention(q, k, v, **options), lse


def inputs(device, B=2, H=4, HK=2, T=70, S=90, D=32, dtype=torch.bfloat16):
    """do, q, k, v as a model has them: (B, T, H, D) in memory."""
    shapes = ((B, T, H, D), (B, T, H, D), (B, S, HK, D), (B, S, HK, D))
    return [torch.randn(shape, device=device).to(dtype).transpose(1, 2) for shape in shapes]


def assert_matches(do, q, k, v, settings=SMALL, causal=False, causal_offset=0):
    scale = q.shape[-1] ** -0.5
    want, out, lse = truth(*map(exact, (do, q, k, v)), scale, causal, causal_offset)
    out, lse = (torch.from_numpy(x).float().to(q.device) for x in (out, lse))
    got = attention_bwd_onepass(
        do, q, k, v, out, lse, scale=scale, causal=causal, causal_offset=causal_offset, settings=settings
    )
    for name, ours, theirs, like in zip(("dq", "dk", "dv"), got, want, (q, k, v), strict=True):
        assert ours.shape == like.shape and ours.dtype == like.dtype, name
        assert ours.is_contiguous() == like.is_contiguous(), name
        # p and ds are rounded to the 16-bit dtype, then summed: relative to what is summed, not to the sum
        assert worst(exact(ours), theirs) <= 4 * torch.finfo(q.dtype).eps * max(np.abs(theirs).max(), 1), name
    return got


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("causal", "offset"), [(False, 0), (True, 0), (True, 20), (True, -25), (True, 200), (True, -200)]
)
def test_matches_numpy(causal, offset, dtype, device):
    """An offset of -25 leaves the first 25 queries without a key, one of -200 all of them."""
    got = assert_matches(*inputs(device, dtype=DTYPES[dtype]), causal=causal, causal_offset=offset)
    if offset == -200:
        assert all(torch.count_nonzero(x) == 0 for x in got)


@pytest.mark.parametrize(
    "shape",
    [
        {"T": 64, "S": 64, "H": 2, "HK": 2},
        {"T": 1, "S": 40},
        {"T": 40, "S": 1},
        {"T": 33, "S": 17, "H": 6, "HK": 1, "B": 1},
        {"D": 8, "T": 40, "S": 40},
        {"D": 80, "T": 40, "S": 40, "B": 1},
    ],
    ids=str,
)
def test_shapes(shape, device):
    assert_matches(*inputs(device, **shape), causal=True, causal_offset=shape.get("S", 90) - shape.get("T", 70))


@pytest.mark.parametrize("D", [64, 128])
def test_the_settings_of_a_gpu(D, device):
    assert_matches(*inputs(device, D=D, B=1, T=150, S=260), settings=None, causal=True, causal_offset=60)


def test_layouts(device):
    """Heads first in memory, and an upstream gradient that is one element, expanded."""
    do, q, k, v = inputs(device)
    do = torch.ones(1, 1, 1, 1, device=device, dtype=do.dtype).expand(do.shape)
    assert_matches(do, q.contiguous(), k.contiguous(), v, causal=True)


def test_keys_past_the_end_do_not_overflow(device):
    """Where every score is far below 0, exp2(0 - lse) of a missing key is infinite."""
    do, q, k, v = inputs(device, T=16, S=40)
    q, k = q.abs() + 4, -k.abs() - 4
    assert_matches(do, q, k, v)


def test_supported(device, monkeypatch):
    _, q, k, v = inputs(device)
    assert not supported(q, k, v), "the tests run under torch.use_deterministic_algorithms"
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    assert supported(q, k, v) and supported(q, k, v, causal_offset=3)
    with assume_chip("sm_80"):
        assert not supported(q, k, v)
    tensor = torch.zeros(2, dtype=torch.int64, device=device)
    others = (
        {"causal_offset": tensor}, {"key_lengths": tensor}, {"window": 4}, {"softcap": 1.0}, {"dropout_p": 0.1},
        {"mask": tensor},
    )  # fmt: skip
    assert not any(supported(q, k, v, **other) for other in others)
    assert not supported(*(x.float() for x in (q, k, v)))
    assert not supported(q, k, v[..., :16]) and not supported(q[..., :20], k[..., :20], v[..., :20].contiguous())
    assert not supported(*(x.repeat(1, 1, 1, 8) for x in (q, k, v))), "rows of 256"
    assert not supported(q, k, v.repeat_interleave(2, -1)[..., ::2])
    assert not supported(q[:, :, :0], k, v) and not supported(q, k[:, :, :0], v[:, :, :0])


def test_settings_fill_wgmma():
    assert all(onepass_default(width).BLOCK_N >= 128 for width in (16, 64, 128))


@pytest.mark.parametrize(
    ("D", "HK", "one_pass"), [(32, 4, True), (64, 2, True), (80, 4, False), (128, 4, False), (128, 2, True)]
)
def test_one_pass_is_chosen_where_it_is_predicted_to_be_faster(D, HK, one_pass, device):
    _, q, k, _ = inputs(device, D=D, HK=HK)
    assert chosen(q, k, True) == one_pass
