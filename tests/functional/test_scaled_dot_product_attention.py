import math

import pytest
import torch
from functional.wrong_calls import refuses

from primer_fast import functional as F
from primer_fast.functional import attention_operator
from primer_fast.functional.scaled_dot_product_attention import scaled_dot_product_attention_plain
from primer_fast.kernels.device import assume_chip
from primer_fast.kernels.scaled_dot_product_attention import (
    AttentionSettings,
    BackwardSettings,
    Band,
    Scoring,
    attention_backward,
    attention_forward,
)  # fmt: skip
from primer_fast.proof import verify
from primer_fast.proof.numerics import exact, worst
from primer_fast.reference.scaled_dot_product_attention import (
    scaled_dot_product_attention,
    scaled_dot_product_attention_grad,
)  # fmt: skip

attend = F.scaled_dot_product_attention
WAYS = [("pointers", torch.float32), ("pointers", torch.float16), ("descriptors", torch.float16)]


def inputs(*shapes, device, dtype=torch.float32, requires_grad=True):
    return [torch.randn(shape, device=device, dtype=dtype, requires_grad=requires_grad) for shape in shapes]


def value_and_grads(function, leaves, dy, **options):
    y = function(*leaves, **options)
    return y, *torch.autograd.grad(y, leaves, dy)


def test_lengths_of_a_single_batch_element(plain_path):
    """On PyTorch's operators the mask of one length has one axis, which they refuse."""
    q, k, v = inputs((1, 2, 3, 16), (1, 2, 8, 16), (1, 2, 8, 16), device="cpu")
    got = attend(q, k, v, key_lengths=torch.tensor([5]))
    torch.testing.assert_close(got, attend(q, k[:, :, :5], v[:, :, :5]), rtol=1e-5, atol=1e-6)


SMALL = AttentionSettings(32, 16, 4, 1)
TILES = [
    (SMALL, BackwardSettings(SMALL, SMALL)),
    (
        AttentionSettings(16, 64, 4, 2, 16),
        BackwardSettings(AttentionSettings(64, 32, 4, 1, 16), AttentionSettings(16, 64, 4, 1, 16), apart=True),
    ),
]
BANDS = {
    "all": Band(), "causal": Band(right=0), "ahead": Band(right=0, offset=37), "behind": Band(right=0, offset=-41),
    "window": Band(left=20, right=0), "both": Band(left=33, right=33), "wide": Band(left=64, right=0, offset=30),
}  # fmt: skip


@pytest.mark.parametrize("band", BANDS.values(), ids=BANDS)
@pytest.mark.parametrize("tiles", TILES, ids=["few queries", "few keys"])
def test_blocks_that_are_skipped_masked_and_left(tiles, band, device):
    """Small tiles on sizes they do not divide: every kind of block comes up."""
    q, k, v, dy = (torch.randn(1, 1, n, 16, device=device) for n in (105, 90, 90, 105))
    scoring = Scoring(0.25)
    out, lse = attention_forward(q, k, v, band, scoring, "highest", True, tiles[0])
    got = out, *attention_backward(dy, q, k, v, out, lse, band, scoring, "highest", settings=tiles[1])
    options = {} if band.right is None else {"causal_offset": band.offset}
    if band.left is not None:
        options["window"] = band.left + 1
    if band.right:
        del options["causal_offset"]
    arrays = [exact(t) for t in (q, k, v)]
    want = scaled_dot_product_attention_grad(exact(dy), *arrays, **options)
    want = [scaled_dot_product_attention(*arrays, **options), *want.values()]
    for name, a, b in zip(("output", "query", "key", "value"), got, want, strict=True):
        assert worst(exact(a), b) < 1e-5, name


def test_lse_is_the_base_2_logarithm_of_the_sum(device):
    q, k, v = inputs((1, 2, 20, 16), (1, 2, 30, 16), (1, 2, 30, 16), device=device, requires_grad=False)
    _, lse = attention_forward(q, k, v, Band(right=0, offset=-3), Scoring(0.25), "highest", True)
    scores = (q @ k.mT * 0.25).masked_fill(torch.ones(20, 30, device=device).tril(-3) == 0, -math.inf)
    want = scores.logsumexp(-1) / math.log(2)
    assert (lse[:, :, :3] == -math.inf).all()
    torch.testing.assert_close(lse[:, :, 3:], want[:, :, 3:], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("path", "dtype"), WAYS[::2], ids=str)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"enable_gqa": True, "softcap": 3.0}], ids=str)
def test_dropout_is_the_same_in_the_backward(options, path, dtype, device):
    p, T, S, D = 0.3, 70, 96, 16
    heads = 2 if "enable_gqa" in options else 4
    leaves = inputs((1, 4, T, D), (1, heads, S, D), (1, heads, S, S), device=device, dtype=dtype)
    dy = torch.randn(1, 4, T, S, device=device, dtype=dtype)
    identity = torch.eye(S, device=device, dtype=dtype).expand(1, heads, S, S)
    with assume_chip(verify.PATHS[path]):
        torch.manual_seed(7)
        with torch.no_grad():
            keep = attend(leaves[0], leaves[1], identity, dropout_p=p, **options) != 0
        torch.manual_seed(7)
        got = value_and_grads(attend, leaves, dy, dropout_p=p, **options)
    seen = torch.ones(T, S, device=device, dtype=torch.bool)
    seen = seen.tril() if "is_causal" in options else seen
    assert keep[..., seen].float().mean().sub(1 - p).abs() < 0.02

    def explicit(q, k, v, enable_gqa=False, is_causal=False, softcap=None):
        k, v = (t.repeat_interleave(4 // heads, 1) for t in (k, v))
        scores = q @ k.mT / math.sqrt(D)
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        return (scores.masked_fill(~seen, -math.inf).softmax(-1) * keep / (1 - p)) @ v

    want = value_and_grads(explicit, [t.detach().float().requires_grad_() for t in leaves], dy.float(), **options)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got, want, check_dtype=False, rtol=tolerance, atol=tolerance)


def test_dropout_follows_the_generator(device):
    q, k = inputs((2, 2, 64, 16), (2, 2, 64, 16), device=device, requires_grad=False)
    identity = torch.eye(64, device=device).expand(2, 2, 64, 64)

    def kept(seed, p=0.5):
        torch.manual_seed(seed)
        return attend(q, k, identity, dropout_p=p) != 0

    first = kept(0)
    assert torch.equal(first, kept(0))
    for other in (kept(1), first.roll(1, 0), first.roll(1, 1), first.roll(1, 2), first.roll(1, 3)):
        assert 0.45 < (first == other).float().mean() < 0.55
    assert not kept(0, p=1.0).any()
    with torch.no_grad():
        assert attend(q, k, identity, dropout_p=1.0).isfinite().all()


def test_layouts_of_output_and_gradients(device):
    """Heads after time in memory, as a fused projection leaves them: the output can be viewed as (B, T, H D)."""
    packed = torch.randn(2, 40, 3, 2, 16, device=device, requires_grad=True)
    q, k, v = (t.transpose(1, 2) for t in packed.unbind(2))
    y = attend(q, k, v, is_causal=True)
    assert y.stride() == (40 * 32, 16, 32, 1) and y.transpose(1, 2).reshape(2, 40, 32).data_ptr() == y.data_ptr()
    assert attend(*(t.contiguous() for t in (q, k, v))).is_contiguous()
    dq, dk, dv = torch.autograd.grad(y, (q, k, v), torch.randn_like(y))
    assert dq.stride() == dk.stride() == dv.stride() == y.stride()


@pytest.mark.parametrize("shapes", [
    ((5, 16), (7, 16), (7, 8)), ((2, 5, 16), (2, 7, 16), (2, 7, 8)),
    ((2, 3, 2, 5, 16), (2, 3, 2, 7, 16), (2, 3, 2, 7, 8)),
    ((2, 4, 5, 16), (1, 4, 7, 16), (2, 1, 7, 16)), ((2, 4, 5, 16), (2, 1, 7, 16), (2, 1, 7, 16)),
    ((4, 5, 16), (2, 4, 7, 16), (7, 16)), ((1, 1, 5, 16), (2, 4, 7, 16), (2, 4, 7, 16)),
    ((2, 1, 2, 5, 16), (2, 3, 2, 7, 16), (1, 3, 2, 7, 16)),
], ids=str)  # fmt: skip
def test_axes_that_torch_takes(shapes, device):
    leaves = inputs(*shapes, device=device)
    T, S = shapes[0][-2], shapes[1][-2]
    mask = torch.rand(T, S, device=device) < 0.7
    want = torch.nn.functional.scaled_dot_product_attention(*leaves, mask)
    dy = torch.randn_like(want)
    got = value_and_grads(attend, leaves, dy, attn_mask=mask)
    assert got[0].shape == want.shape
    torch.testing.assert_close(got[1:], torch.autograd.grad(want, leaves, dy), rtol=1e-4, atol=1e-5)


def test_each_leading_axis_has_its_lengths_and_offsets(device):
    leaves = inputs((2, 2, 1, 9, 16), (2, 2, 1, 12, 16), (2, 2, 1, 12, 16), device=device)
    options = {
        "key_lengths": torch.tensor([[3, 12], [0, 7]], device=device),
        "causal_offset": torch.tensor([[0, 5], [9, -4]], device=device, dtype=torch.int32),
    }
    dy = torch.randn(2, 2, 1, 9, 16, device=device)
    got = value_and_grads(attend, leaves, dy, **options)
    want = value_and_grads(scaled_dot_product_attention_plain, leaves, dy, **options)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_offsets_beyond_all_positions(device):
    q, k, v = inputs(*[(2, 1, 20, 16)] * 3, device=device, requires_grad=False)
    far = torch.tensor([2**40, -(2**40)], device=device)
    got = attend(q, k, v, causal_offset=far, key_lengths=torch.tensor([2**40, 20], device=device))
    torch.testing.assert_close(got[:1], attend(q[:1], k[:1], v[:1]), rtol=1e-5, atol=1e-5)
    assert (got[1] == 0).all()
    for offset, want in ((2**40, attend(q, k, v)), (-(2**40), torch.zeros_like(q))):
        torch.testing.assert_close(attend(q, k, v, causal_offset=offset), want, rtol=1e-5, atol=1e-5)


def test_mask_and_causality_together(device):
    leaves = inputs(*[(1, 2, 30, 16)] * 3, device=device)
    mask, dy = torch.rand(30, 30, device=device) < 0.6, torch.randn(1, 2, 30, 16, device=device)
    got = value_and_grads(attend, leaves, dy, attn_mask=mask, is_causal=True)
    want = value_and_grads(scaled_dot_product_attention_plain, leaves, dy, attn_mask=mask.tril())
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_zero_scale_gives_equal_weights(device):
    q, k, v = inputs(*[(1, 1, 20, 16)] * 3, device=device, requires_grad=False)
    want = v.cumsum(2) / torch.arange(1, 21, device=device)[:, None]
    torch.testing.assert_close(attend(q, k, v, is_causal=True, scale=0.0), want, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:(invalid value|All-NaN):RuntimeWarning")
@pytest.mark.parametrize(("path", "dtype"), WAYS[::2], ids=str)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"softcap": 2.0}], ids=str)
def test_nan_and_infinity(options, path, dtype, device):
    """A NaN in a query spoils its row and no other; the sum that carries it is not a maximum, which would drop it."""
    q, k, v = inputs(*[(1, 1, 100, 16)] * 3, device=device, dtype=dtype, requires_grad=False)
    q[0, 0, 20, 3], q[0, 0, 90, 0] = float("nan"), float("nan")
    with assume_chip(verify.PATHS[path]):
        y = attend(q, k, v, **options)
    rows = y.isnan().all(-1)[0, 0]
    assert rows.nonzero().flatten().tolist() == [20, 90] and y.isnan().any(-1)[0, 0].sum() == 2
    v[0, 0, 60, 5] = float("nan")
    with assume_chip(verify.PATHS[path]):
        y = attend(q, k, v, **options)
    assert y[0, 0, 60:, 5].isnan().all() and not y[0, 0, 91:, :5].isnan().any()
    q[0, 0, 10] = float("inf")  # infinite scores of both signs
    assert attend(q, k, v, **options)[0, 0, 10].isnan().all() or "softcap" in options


@pytest.mark.parametrize("D", [16, 72])
@pytest.mark.parametrize(("path", "dtype"), WAYS, ids=str)
def test_memory_past_the_lengths_has_no_influence(path, dtype, D, device):
    """A cache holds whatever was there before, NaN included."""
    lengths = torch.tensor([70, 0, 5], device=device)
    leaves = inputs((3, 2, 20, D), (3, 2, 90, D), (3, 2, 90, D), device=device, dtype=dtype)
    dy = torch.randn(3, 2, 20, D, device=device, dtype=dtype)
    with assume_chip(verify.PATHS[path]):
        want = value_and_grads(attend, leaves, dy, key_lengths=lengths)
        with torch.no_grad():
            for t in leaves[1:]:
                for b, length in enumerate(lengths.tolist()):
                    t[b, :, length:] = float("nan")
        got = value_and_grads(attend, leaves, dy, key_lengths=lengths)
    for name, a, b in zip(("output", "query", "key", "value"), got, want, strict=True):
        assert torch.equal(a, b), name
    assert (got[0][1] == 0).all() and (got[2][1] == 0).all() and (got[2][2, :, 5:] == 0).all()


def test_rows_that_see_nothing_have_no_gradient(device):
    leaves = inputs(*[(1, 1, 20, 16)] * 3, device=device)
    mask = torch.ones(20, 20, dtype=torch.bool, device=device)
    mask[3] = False
    bias = torch.zeros(20, 20, device=device).masked_fill(~mask, -math.inf)
    for attn_mask in (mask, bias):
        for softcap in (None, 2.0):
            y, *grads = value_and_grads(
                attend, leaves, torch.ones_like(leaves[0]), attn_mask=attn_mask, softcap=softcap
            )
            assert (y[0, 0, 3] == 0).all() and (grads[0][0, 0, 3] == 0).all()
            assert all(g.isfinite().all() for g in grads)


def test_other_dtypes_and_wide_heads_take_plain_pytorch(device):
    leaves = inputs(*[(1, 2, 5, 4)] * 3, device=device, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *t: attend(*t, is_causal=True, window=3), leaves)
    q = torch.randn(1, 1, 6, 300, device=device)
    torch.testing.assert_close(attend(q, q, q), scaled_dot_product_attention_plain(q, q, q))


ones = torch.ones
Q = ones(2, 4, 5, 8)
WRONG = [
    (TypeError, "query must be a tensor; got list", ([1.0], Q, Q), {}),
    (TypeError, "one dtype; got query torch.float32 and key torch.float16", (Q, Q.half(), Q), {}),
    (ValueError, "one device; got query cpu, value meta", (Q, Q, Q.to("meta")), {}),
    (TypeError, "query must be floating; got torch.int64", (Q.long(), Q.long(), Q.long()), {}),
    (ValueError, r"query \(2, 4, 5, 8\), key \(2, 4, 5, 9\)", (Q, ones(2, 4, 5, 9), Q), {}),
    (ValueError, r"value \(2, 4, 6, 8\)", (Q, Q, ones(2, 4, 6, 8)), {}),
    (ValueError, r"got query \(8,\)", (ones(8), ones(8), ones(8)), {}),
    (ValueError, "with enable_gqa Hk must divide H; got", (Q, ones(2, 2, 5, 8), ones(2, 2, 5, 8)), {}),
    (ValueError, "Hk must divide H", (Q, ones(2, 3, 5, 8), ones(2, 3, 5, 8)), {"enable_gqa": True}),
    (ValueError, "leading axes must broadcast", (Q, ones(3, 4, 5, 8), ones(3, 4, 5, 8)), {}),
    (ValueError, r"broadcast to \(2, 4, 5, 5\); got \(5, 6\)", (Q, Q, Q), {"attn_mask": ones(5, 6)}),
    (TypeError, "attn_mask must be torch.bool or .*; got torch.int64", (Q, Q, Q), {"attn_mask": ones(5, 5).long()}),
    (ValueError, "one element per batch element, 2; got", (Q, Q, Q), {"key_lengths": torch.tensor([1, 2, 3])}),
    (TypeError, "key_lengths must hold integers", (Q, Q, Q), {"key_lengths": ones(2)}),
    (TypeError, "key_lengths must be an integer tensor; got 3", (Q, Q, Q), {"key_lengths": 3}),
    (TypeError, "causal_offset must be an integer tensor or an int; got 1.5", (Q, Q, Q), {"causal_offset": 1.5}),
    (ValueError, "window must be an integer of at least 1; got 0", (Q, Q, Q), {"window": 0}),
    (ValueError, "softcap must be positive; got 0", (Q, Q, Q), {"softcap": 0}),
    (ValueError, "softcap .*; got -1.0", (Q, Q, Q), {"softcap": -1.0}),
    (ValueError, "dropout_p must be between 0 and 1; got 1.5", (Q, Q, Q), {"dropout_p": 1.5}),
    (ValueError, "dropout_p .*; got -0.1", (Q, Q, Q), {"dropout_p": -0.1}),
    ((TypeError, ValueError), "scale .*; got '1'", (Q, Q, Q), {"scale": "1"}),
    (TypeError, "causal_offset .*; got True", (Q, Q, Q), {"causal_offset": True}),
    (NotImplementedError, "attn_mask.detach", (Q, Q, Q), {"attn_mask": ones(5, 5, requires_grad=True)}),
]

test_wrong_arguments = refuses("scaled_dot_product_attention", WRONG)


@pytest.mark.parametrize("options", [
    {}, {"causal_offset": 290}, {"window": 30}, {"window": 30, "causal_offset": 270}, {"softcap": 2.0},
    {"key_lengths": [300, 0, 131], "causal_offset": [299, 8, 127]}, {"attn_mask": True}, {"enable_gqa": True},
], ids=" ".join)  # fmt: skip
def test_few_queries_share_out_many_keys(options, device, monkeypatch):
    """What a gradient would take the other way gives the same without one; NaN past the lengths too."""
    calls = []
    decode = attention_operator.attention_decode
    monkeypatch.setattr(attention_operator, "attention_decode", lambda *a, **o: calls.append(1) or decode(*a, **o))
    options = {n: torch.tensor(o, device=device) if isinstance(o, list) else o for n, o in options.items()}
    if "attn_mask" in options:
        options["attn_mask"] = torch.rand(3, 1, 4, 300, device=device) < 0.5
    heads = 1 if "enable_gqa" in options else 2
    leaves = inputs((3, 2, 4, 16), (3, heads, 300, 16), (3, heads, 300, 24), device=device)
    if "key_lengths" in options:
        with torch.no_grad():
            for t in leaves[1:]:
                t[2, :, 131:] = float("nan")
    want = attend(*leaves, **options)
    assert calls == []
    with torch.no_grad():
        got = attend(*leaves, **options)
    assert calls == [1] and got.stride() == want.stride()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_one_pass_backward_is_taken_only_when_asked_for(device, monkeypatch):
    calls = []
    one_pass = attention_operator.attention_bwd_onepass
    monkeypatch.setattr(
        attention_operator, "attention_bwd_onepass", lambda *a, **o: calls.append(1) or one_pass(*a, **o)
    )
    leaves = inputs((2, 4, 90, 32), (2, 2, 100, 32), (2, 2, 100, 32), device=device, dtype=torch.bfloat16)
    dy = torch.randn(2, 4, 90, 32, device=device, dtype=torch.bfloat16)

    def run(fast, leaves=leaves, **options):
        with assume_chip("sm_90"):
            with F.fast_attention_backward(fast):
                y = attend(*leaves, enable_gqa=True, **options)
            return y, *torch.autograd.grad(y, [t for t in leaves if t.requires_grad], dy)

    run(True, causal_offset=-5)
    assert calls == []  # torch.use_deterministic_algorithms(True) holds in tests
    torch.use_deterministic_algorithms(False)
    run(False, causal_offset=-5)
    run(True, window=7)
    run(True, dropout_p=0.1)
    run(True, leaves=[leaves[0], *(t.detach() for t in leaves[1:])])
    assert calls == []
    for options in ({"causal_offset": -5}, {}):
        want = run(False, **options)
        got = run(True, **options)
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    assert calls == [1, 1]


def test_offsets_pass_two_to_the_31(far_rows):
    """Row times stride is formed in 64 bits."""
    device, rows = far_rows.device, len(far_rows)
    x = far_rows[None, None, :, :16]
    x.copy_(torch.arange(rows * 16, dtype=torch.float16, device=device).view(rows, 16) / 16)
    with assume_chip("sm_80"):
        assert torch.equal(attend(x, x, x), attend(*[x.contiguous()] * 3))
