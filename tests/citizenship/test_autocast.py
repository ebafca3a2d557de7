"""Under torch.autocast every op runs in the dtype in which PyTorch's op of that name does, and so do its gradients."""

import pytest
import torch
import torch.nn.functional as torch_F
from catalogue import ATTENTION, NAMED, OPS, upstream

from primer_fast import functional as F

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)


def dtypes_of(function, inputs, place, **autocast):
    """-> of the output and of each gradient; or None where it is refused"""
    try:
        with torch.autocast(place, **autocast):
            y = function(*inputs)
        return [t.dtype for t in (y, *torch.autograd.grad(y, inputs, upstream(y)))]
    except (TypeError, ValueError, RuntimeError):
        return None


def combinations(inputs):
    """All inputs of one dtype, and one of them of another, float64 among them."""
    for dtype in (*DTYPES, torch.float64):
        yield (dtype,) * inputs
    for i in range(inputs if inputs > 1 else 0):
        for base, odd in ((torch.float32, other) for other in (*HALVES, torch.float64)):
            yield (base,) * i + (odd,) + (base,) * (inputs - i - 1)
        yield (torch.bfloat16,) * i + (torch.float32,) + (torch.bfloat16,) * (inputs - i - 1)


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_dtypes_are_torchs(name, half, place):
    """What PyTorch refuses is refused, but that layer_norm takes a weight and a bias of two dtypes on a CPU too."""
    op = OPS[name]
    accepted = 0
    for dtypes in combinations(len(op.shapes)):
        inputs = op.floats(dtypes, place)
        got, want = (dtypes_of(f, inputs, place, dtype=half) for f in (op.ours, op.torchs))
        if want is None and op.op == "layer_norm" and got is not None:
            assert got[1:] == list(dtypes)
            continue
        assert got == want, dtypes
        accepted += want is not None
    assert accepted >= len(DTYPES)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("cache", [True, False])
def test_values_are_torchs(name, cache, place):
    """Twice in one context, with and without PyTorch's cache of cast weights."""
    op = OPS[name]
    results = []
    for function in (op.ours, op.torchs):
        inputs = op.floats(torch.float32, place)
        with torch.autocast(place, torch.bfloat16, cache_enabled=cache):
            y = function(*inputs) + function(*inputs)
        results.append((y, *torch.autograd.grad(y, inputs, upstream(y))))
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("name", OPS)
def test_nested_and_disabled(name, place):
    """An inner context that is off leaves float32 alone, and the outer one holds again after it."""
    op = OPS[name]
    inputs = op.floats(torch.float32, place)
    bare = op.ours(*inputs)
    with torch.autocast(place, torch.bfloat16):
        outer = op.ours(*inputs)
        with torch.autocast(place, enabled=False):
            inner = op.ours(*inputs)
        after = op.ours(*inputs)
    assert inner.dtype == torch.float32 and torch.equal(inner, bare)
    assert after.dtype == outer.dtype and torch.equal(after, outer)


@pytest.mark.parametrize("dtype", [torch.bool, *DTYPES], ids=str)
def test_masks_of_attention(dtype, place):
    q, k, v = OPS[f"{ATTENTION}: causal"].floats(torch.float32, place)
    mask = (torch.arange(64, device=place).view(8, 8) % 3 > 0).to(dtype)
    with torch.autocast(place, torch.bfloat16):
        got, want = (f(q, k, v, mask) for f in (F.scaled_dot_product_attention, torch_F.scaled_dot_product_attention))
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_probabilities_are_float32(dtype, half, place):
    """linear_log_prob, which PyTorch lacks: a product in autocast's dtype, then log_softmax, which is float32."""
    inputs = OPS["linear_log_prob: bias"].floats(dtype, place)
    target = torch.arange(3, device=place)
    with torch.autocast(place, half):
        y, entropy = F.linear_log_prob(inputs[0], inputs[1], target, linear_bias=inputs[2], return_entropy=True)
        cast = [t.to(half) for t in inputs]
    want, want_entropy = F.linear_log_prob(cast[0], cast[1], target, linear_bias=cast[2], return_entropy=True)
    assert y.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close((y, entropy), (want, want_entropy), rtol=2e-2, atol=2e-2)
    grads = torch.autograd.grad(y.sum() + entropy.sum(), inputs)
    assert [g.dtype for g in grads] == [dtype] * 3
