import math

import pytest
import torch

from primer_fast import nn


def pair(device, embed_dim=24, num_heads=3, dtype=torch.float32, **options):
    """Ours and torch's with the same weights; biases are not the zeros that they start with."""
    ours = nn.MultiheadAttention(embed_dim, num_heads, device=device, dtype=dtype, **options)
    theirs = torch.nn.MultiheadAttention(embed_dim, num_heads, device=device, dtype=dtype, **options)
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if "bias" in name:
                p.normal_()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def inputs(device, batch_first, self_attention, unbatched=False, T=5, S=7, N=2, widths=(24, 24, 24)):
    lengths = (T, T, T) if self_attention else (T, S, S)
    shapes = [(n, w) if unbatched else (N, n, w) if batch_first else (n, N, w)
              for n, w in zip(lengths, widths, strict=True)]  # fmt: skip
    if self_attention:
        x = torch.randn(shapes[0], device=device, requires_grad=True)
        return x, x, x
    return tuple(torch.randn(shape, device=device, requires_grad=True) for shape in shapes)


def assert_same(ours, theirs, qkv, **options):
    """Output, weights and every gradient."""
    results = [module(*qkv, **options) for module in (ours, theirs)]
    (got, got_weights), (want, want_weights) = results
    assert got.shape == want.shape and (got_weights is None) == (want_weights is None)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    dy = torch.randn_like(want)
    outputs, upstream = [[got], [want]], [dy]
    if want_weights is not None:
        torch.testing.assert_close(got_weights, want_weights, rtol=1e-4, atol=1e-6)
        upstream.append(torch.randn_like(want_weights))
        outputs = [list(result) for result in results]
    leaves = list({id(x): x for x in qkv}.values())
    grads = [
        torch.autograd.grad(y, (*leaves, *module.parameters()), upstream)
        for y, module in zip(outputs, (ours, theirs), strict=True)
    ]
    names = [*(f"input {i}" for i in range(len(leaves))), *(name for name, _ in ours.named_parameters())]
    for name, ours_grad, theirs_grad in zip(names, *grads, strict=True):
        torch.testing.assert_close(
            ours_grad, theirs_grad, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("options", [{}, {"need_weights": False}, {"average_attn_weights": False}], ids=str)
@pytest.mark.parametrize("to", ["itself", "one tensor", "keys and values"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_is_torch_multihead_attention(batch_first, to, options, device, plain_path):
    ours, theirs = pair(device, batch_first=batch_first)
    q, k, v = inputs(device, batch_first, to == "itself")
    assert_same(ours, theirs, (q, k, k if to == "one tensor" else v), **options)


def test_on_the_kernels(device):
    ours, theirs = pair(device, 16, 2, batch_first=True)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2], device=device)
    qkv = inputs(device, True, True, widths=(16,) * 3)
    assert_same(ours, theirs, qkv, key_padding_mask=padding, need_weights=False)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_widths_of_keys_and_values(bias, need_weights, device, plain_path):
    ours, theirs = pair(device, bias=bias, kdim=10, vdim=12)
    assert list(ours.state_dict()) == list(theirs.state_dict()) and "q_proj_weight" in ours.state_dict()
    assert_same(ours, theirs, inputs(device, False, False, widths=(24, 10, 12)), need_weights=need_weights)


def masks(kind, T, S, N, heads, device):
    """attn_mask, key_padding_mask in which every query sees something."""
    attn = torch.rand(N * heads, T, S, device=device) < 0.4
    attn[..., 0] = False
    padding = torch.arange(S, device=device) >= torch.tensor([S, 3], device=device)[:N, None]
    if kind == "float":
        attn, padding = (torch.randn(m.shape, device=device).masked_fill(m, -math.inf) for m in (attn, padding))
    return attn, padding


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("which", ["attn of all", "attn of each head", "padding", "both"])
def test_masks(which, kind, need_weights, device, plain_path):
    """In torch's module True takes a position out: the opposite of scaled_dot_product_attention."""
    ours, theirs = pair(device, batch_first=True)
    attn, padding = masks(kind, 5, 7, 2, 3, device)
    attn = {"attn of all": attn[0], "attn of each head": attn, "both": attn[0]}.get(which)
    padding = padding if which in ("padding", "both") else None
    qkv = inputs(device, True, False)
    assert_same(ours, theirs, qkv, attn_mask=attn, key_padding_mask=padding, need_weights=need_weights)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_causal(padded, need_weights, device, plain_path):
    ours, theirs = pair(device, batch_first=True)
    causal = torch.ones(5, 5, dtype=torch.bool, device=device).triu(1)
    padding = masks("bool", 5, 5, 2, 3, device)[1] if padded else None
    qkv = inputs(device, True, True)
    assert_same(
        ours, theirs, qkv, attn_mask=causal, is_causal=True, key_padding_mask=padding, need_weights=need_weights
    )


@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_a_bool_mask_beside_a_floating_one(device, plain_path):
    ours, theirs = pair(device)
    attn, padding = masks("bool", 5, 7, 2, 3, device)[0][0], masks("float", 5, 7, 2, 3, device)[1]
    assert_same(ours, theirs, inputs(device, False, False), attn_mask=attn, key_padding_mask=padding)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_without_a_batch(batch_first, average, need_weights, device, plain_path):
    ours, theirs = pair(device, batch_first=batch_first)
    attn, padding = masks("bool", 5, 7, 1, 3, device)
    options = {"attn_mask": attn, "key_padding_mask": padding[0], "need_weights": need_weights}
    qkv = inputs(device, batch_first, False, unbatched=True)
    assert_same(ours, theirs, qkv, average_attn_weights=average, **options)


@pytest.mark.parametrize("need_weights", [True, False])
def test_queries_that_see_nothing(need_weights, device, plain_path):
    ours, theirs = pair(device, batch_first=True)
    attn = torch.zeros(5, 5, dtype=torch.bool, device=device)
    attn[2] = True
    x = torch.randn(2, 5, 24, device=device)
    for got, want in zip(*(m(x, x, x, attn_mask=attn, need_weights=need_weights) for m in (ours, theirs)), strict=True):
        if want is not None:
            torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_in_training_alone(need_weights, device, plain_path):
    ours = nn.MultiheadAttention(24, 3, dropout=0.5, batch_first=True, device=device)
    x = torch.randn(2, 5, 24, device=device)
    first, second = (ours(x, x, x, need_weights=need_weights)[0] for _ in range(2))
    assert not torch.equal(first, second)
    ours.eval()
    first, second = (ours(x, x, x, need_weights=need_weights)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_dropout_drops_weights_and_scales_the_rest(device, plain_path):
    ours = nn.MultiheadAttention(24, 3, dropout=0.25, batch_first=True, device=device)
    x = torch.randn(4, 40, 24, device=device)
    _, dropped = ours(x, x, x, average_attn_weights=False)
    _, whole = ours.eval()(x, x, x, average_attn_weights=False)
    kept = dropped != 0
    assert 0.7 < kept.float().mean() < 0.8
    torch.testing.assert_close(dropped[kept], whole[kept] / 0.75)


def test_same_first_weights_as_torch():
    for options in ({}, {"kdim": 6, "bias": False}):
        states = []
        for module in (nn.MultiheadAttention, torch.nn.MultiheadAttention):
            torch.manual_seed(3)
            states.append(module(8, 2, **options).state_dict())
        assert list(states[0]) == list(states[1])
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_self_attention_projects_once(device, plain_path, monkeypatch):
    ours = nn.MultiheadAttention(24, 3, device=device)
    calls, linear = [], nn.attention.F.linear
    monkeypatch.setattr(nn.attention.F, "linear", lambda x, *rest: calls.append(x.shape) or linear(x, *rest))
    x = torch.randn(5, 2, 24, device=device)
    ours(x, x, x, need_weights=False)
    assert len(calls) == 2, "one for queries, keys and values; one for the output"


X = torch.ones(5, 2, 8)
WRONG = [
    (ValueError, r"end in \(8, 8, 8\)", (X, X, X[..., :4]), {}),
    (ValueError, r"one length", (X, X, X[:3]), {}),
    (ValueError, r"one batch size", (X, X[:, :1], X[:, :1]), {}),
    (ValueError, r"3 axes", (X, X[0], X[0]), {}),
    (ValueError, r"key_padding_mask must be \(2, 5\); got \(5, 2\)", (X, X, X), {"key_padding_mask": torch.ones(5, 2)}),
    (ValueError, r"attn_mask must be \(5, 5\) or \(4, 5, 5\)", (X, X, X), {"attn_mask": torch.ones(2, 5, 5)}),
    (TypeError, r"attn_mask must be bool or floating", (X, X, X), {"attn_mask": torch.ones(5, 5, dtype=torch.int64)}),
    (ValueError, r"is_causal .*needs it", (X, X, X), {"is_causal": True}),
]


@pytest.mark.parametrize(("error", "message", "args", "options"), WRONG, ids=[w[1] for w in WRONG])
def test_wrong_arguments(error, message, args, options):
    with pytest.raises(error, match=message):
        nn.MultiheadAttention(8, 2)(*args, **options)


def test_what_is_not_built_names_what_to_use():
    for option in ("add_bias_kv", "add_zero_attn"):
        with pytest.raises(NotImplementedError, match=f"{option} is not built; use torch.nn.MultiheadAttention"):
            nn.MultiheadAttention(8, 2, **{option: True})
    with pytest.raises(ValueError, match="multiple of num_heads; got embed_dim 8 and num_heads 3"):
        nn.MultiheadAttention(8, 3)
