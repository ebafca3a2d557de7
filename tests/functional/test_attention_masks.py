"""Masks that are added to the scores: numbers so far from 0 that scores are lost in them, and mixtures of dtypes."""

import itertools
import math

import pytest
import torch

from primer_fast import functional as F

FAR = [torch.finfo(torch.float32).min, -1e30, -1e9, 1e30, torch.finfo(torch.float32).max]
CLOSE = {"rtol": 2e-5, "atol": 2e-5}
OPTIONS = [
    {}, {"is_causal": True, "softcap": 2.0, "enable_gqa": True}, {"window": 70, "key_lengths": [90, 260]},
]  # fmt: skip


def far_mask(T, S):
    """(T, S): rows that have a far number on all keys, on all but the first, on the first; -inf; plain numbers."""
    mask = torch.randn(T, S)
    for row, (far, kind) in zip(range(T), itertools.cycle(itertools.product(FAR, range(5))), strict=False):
        if kind < 3:
            mask[row, (slice(None), slice(S // 3, None), slice(S // 3))[kind]] = far
        elif kind == 3:
            mask[row] = -math.inf
    return mask


def formula(q, k, v, mask, is_causal=False, softcap=None, window=None, key_lengths=None, enable_gqa=False):
    """In float64, but scores and mask are added in float32, as torch does."""
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = q.double() @ k.double().mT / math.sqrt(q.shape[-1])
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = (scores.float() + mask).double()
    i, j = torch.arange(q.shape[2], device=q.device)[:, None], torch.arange(k.shape[2], device=q.device)
    if is_causal:
        scores = scores.masked_fill(j > i, -math.inf)
    if window is not None:
        scores = scores.masked_fill((i - j).abs() >= window, -math.inf)
    if key_lengths is not None:
        scores = scores.masked_fill(j >= key_lengths.view(-1, 1, 1, 1), -math.inf)
    nothing = (scores == -math.inf).all(-1, keepdim=True)
    return scores.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0) @ v.double()


@pytest.mark.parametrize(("T", "S", "options"), [*((25, 260, options) for options in OPTIONS), (200, 20, {})], ids=str)
def test_finite_masks_stay_finite(T, S, options, device):
    """Rows that have the same far number everywhere are rows of equal weights, not rows that see nothing."""
    options = {name: torch.tensor(n, device=device) if name == "key_lengths" else n for name, n in options.items()}
    shared = 1 if "enable_gqa" in options else 2
    shapes = (2, 2, T, 16), (2, shared, S, 16), (2, shared, S, 16), (2, 2, T, 16)
    q, k, v, dy = (torch.randn(shape, device=device) for shape in shapes)
    mask, leaves = far_mask(T, S).to(device), [t.requires_grad_() for t in (q, k, v)]
    want = formula(*leaves, mask, **options)
    got = F.scaled_dot_product_attention(*leaves, mask, **options)
    with torch.no_grad():  # few queries of many keys: the keys are shared out
        torch.testing.assert_close(F.scaled_dot_product_attention(*leaves, mask, **options).double(), want, **CLOSE)
    grads = (torch.autograd.grad(y, leaves, dy.to(y.dtype)) for y in (got, want))
    for a, b in [(got, want), *zip(*grads, strict=True)]:
        torch.testing.assert_close(a.double(), b.double(), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_least_number_of_the_masks_own_dtype(dtype, device):
    q, k, v = (torch.randn(1, 1, n, 16, device=device, dtype=dtype) for n in (20, 40, 40))
    mask = torch.zeros(20, 40, device=device, dtype=dtype)
    mask[3:6] = torch.finfo(dtype).min
    mask[6:9, 10:] = torch.finfo(dtype).min
    for softcap in (None, 30.0):
        got = F.scaled_dot_product_attention(q, k, v, mask, softcap=softcap)
        want = formula(q, k, v, mask.float(), softcap=softcap)
        torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("softcap", [900.0, 1e5, 1e18, 1e30, math.inf])
def test_a_great_softcap_leaves_scores_as_they_are(softcap, device):
    q, k, v = (torch.randn(1, 1, n, 16, device=device, dtype=torch.float16) for n in (20, 40, 40))
    got = F.scaled_dot_product_attention(q, k, v, softcap=softcap)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v), rtol=2e-3, atol=2e-3)


MIXED = list(itertools.product((torch.float16, torch.bfloat16), (torch.bool, torch.float32, "own"), (None, 2.0)))


@pytest.mark.parametrize("options", [{}, {"is_causal": True, "key_lengths": [3, 6], "dropout_p": 0.3}], ids=" ".join)
@pytest.mark.parametrize("cpu", [True, False], ids=["torch", "kernels"])
def test_every_mixture_of_dtype_mask_and_option_gives_a_result(cpu, options, device, request):
    device = torch.device("cpu") if cpu else device
    if cpu:
        request.getfixturevalue("plain_path")
    options = {name: torch.tensor(n, device=device) if name == "key_lengths" else n for name, n in options.items()}
    for dtype, kind, softcap in MIXED if cpu else MIXED[: len(MIXED) // 2]:
        q, k, v = (torch.randn(2, 2, n, 16, device=device, dtype=dtype, requires_grad=True) for n in (5, 6, 6))
        mask = torch.randn(5, 6, device=device)
        mask = mask > -1 if kind == torch.bool else mask.to(dtype if kind == "own" else kind)
        y = F.scaled_dot_product_attention(q, k, v, mask, softcap=softcap, **options)
        assert y.dtype == dtype and y.isfinite().all(), (dtype, kind, softcap)
        assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), (q, k, v))), (dtype, kind, softcap)
        if "dropout_p" not in options:
            want = formula(q, k, v, torch.where(mask, 0.0, -math.inf) if kind == torch.bool else mask.float(),
                           softcap=softcap)  # fmt: skip
            torch.testing.assert_close(y.double(), want, rtol=2e-2, atol=2e-2)
