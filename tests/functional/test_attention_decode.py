"""The split-keys kernel by its launcher: every way to limit what a query sees, in one share of the keys and in many."""

import math

import numpy as np
import pytest
import torch

from primer_fast.kernels.attention.decode import DecodeProblem, DecodeSettings, attention_decode, decode_choice
from primer_fast.kernels.device import CHIPS
from primer_fast.proof.numerics import budget, exact, worst
from primer_fast.proof.verify import DTYPES
from primer_fast.reference.scaled_dot_product_attention import scaled_dot_product_attention

TILES = {
    "one share": DecodeSettings(16, 32, 1, 4, 2),
    "three shares": DecodeSettings(16, 16, 3, 4, 2),
    "more shares than blocks": DecodeSettings(16, 32, 11, 4, 2),
}


def truth(
    q, k, v, scale=None, causal=False, causal_offset=None, window=None, softcap=None, key_lengths=None, mask=None
):
    """float64: what is seen becomes a mask."""
    batch = (len(q), 1, 1, 1)
    at = np.arange(q.shape[2])[:, None] + np.broadcast_to(
        0 if causal_offset is None else causal_offset, len(q)
    ).reshape(batch)
    j = np.arange(k.shape[2])
    seen = np.ones((*q.shape[:3], k.shape[2]), dtype=bool)
    if key_lengths is not None:
        seen &= j < np.reshape(key_lengths, batch)
    if causal:
        seen &= j <= at
    if window is not None:
        seen &= (j > at - window) & (causal | (j < at + window))
    if mask is not None and mask.dtype == bool:
        seen &= mask
    added = np.where(seen, 0.0 if mask is None or mask.dtype == bool else mask, -np.inf)
    return scaled_dot_product_attention(q, k, v, added, scale=scale, softcap=softcap, enable_gqa=True)


def call(q, k, v, settings=None, **options):
    defaults = {
        "scale": q.shape[-1] ** -0.5, "causal": False, "causal_offset": None, "window": None, "softcap": None,
        "key_lengths": None, "mask": None, "precision": "highest",
    }  # fmt: skip
    return attention_decode(q, k, v, **defaults | options, settings=settings)


def cache(device, B=2, H=4, HK=2, T=3, S=100, D=16, DV=16, dtype=torch.float32):
    """q, k, v as a model has them: (B, T, H, D) in memory."""
    shapes = ((B, T, H, D), (B, S, HK, D), (B, S, HK, DV))
    return [torch.randn(shape, device=device).to(dtype).transpose(1, 2) for shape in shapes]


def assert_matches(q, k, v, settings=None, **options):
    got = call(q, k, v, settings, **options)
    arrays = {
        name: exact(x) if isinstance(x, torch.Tensor) and x.dtype != torch.bool else x for name, x in options.items()
    }
    if options.get("mask") is not None and options["mask"].dtype == torch.bool:
        arrays["mask"] = options["mask"].cpu().numpy()
    want = truth(*map(exact, (q, k, v)), **arrays)
    assert got.shape == want.shape and got.dtype == q.dtype
    # A sum of products is off by the rounding of each p and v, and of the result
    assert worst(exact(got), want) <= budget(q.dtype, torch.finfo(q.dtype).eps * np.abs(exact(v)).max(initial=0), want)
    return got


def options(device):
    """One set of options for each way to limit what is seen, of cache()'s shapes."""
    lengths = torch.tensor([37, 100], device=device)
    additive = torch.randn(2, 1, 3, 100, device=device)
    additive[..., ::5] = -math.inf
    return {
        "all keys": {},
        "scale": {"scale": 0.7},
        "softcap": {"softcap": 0.8},
        "softcap that equals 1 / log2(e)": {"softcap": math.log(2), "scale": 2.0},
        "causal from the top left": {"causal": True},
        "causal at the end": {"causal": True, "causal_offset": 97},
        "causal offset per sequence": {"causal": True, "causal_offset": torch.tensor([5, 61], device=device)},
        "causal offset of no axes": {"causal": True, "causal_offset": torch.tensor(40, device=device)},
        "causal, rows that see nothing": {"causal": True, "causal_offset": -2},
        "lengths": {"key_lengths": lengths},
        "lengths 0 and 1": {"key_lengths": torch.tensor([0, 1], device=device, dtype=torch.int32)},
        "lengths past the end, negative": {"key_lengths": torch.tensor([-3, 1000], device=device)},
        "lengths and offsets": {"key_lengths": lengths, "causal": True, "causal_offset": lengths - 3},
        "causal window": {"causal": True, "causal_offset": 70, "window": 33},
        "offset past all numbers": {"causal": True, "causal_offset": 2**40},
        "window past all numbers": {"causal": True, "causal_offset": 60, "window": 2**62},
        "offsets past all numbers": {"causal": True, "causal_offset": torch.tensor([2**40, -(2**40)], device=device)},
        "window to both sides": {"causal_offset": 50, "window": 7},
        "window of one key": {"causal": True, "causal_offset": 64, "window": 1},
        "window before the first key": {"causal_offset": -60, "window": 3},
        "bool mask of keys": {"mask": torch.rand(2, 1, 1, 100, device=device) < 0.3},
        "bool mask that empties rows": {"mask": torch.arange(3, device=device).view(3, 1) == 1},
        "additive mask": {"mask": additive},
        "additive mask of heads": {"mask": torch.randn(1, 4, 3, 100, device=device)},
        "everything": {"mask": additive, "softcap": 2.0, "key_lengths": lengths, "causal": True, "window": 60,
                       "causal_offset": torch.tensor([30, 90], device=device)},
    }  # fmt: skip


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("which", options("cpu"))
def test_matches_a_row_by_row_reference(which, tile, device):
    assert_matches(*cache(device), TILES[tile], **options(device)[which])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        {"T": 1, "H": 8, "HK": 1, "S": 257},
        {"T": 1, "H": 2, "HK": 2, "S": 1},
        {"T": 16, "H": 6, "HK": 2, "S": 70},  # 48 rows in one tile
        {"T": 7, "H": 12, "HK": 1, "S": 40, "B": 1},  # 84 rows: two tiles
        {"D": 24, "DV": 40, "S": 33},
        {"D": 1, "DV": 1},
        {"D": 80, "DV": 130, "H": 2, "B": 1},
        {"D": 256, "DV": 256, "H": 2, "HK": 1, "T": 1, "S": 65, "B": 1},
    ],
    ids=str,
)
def test_shapes_and_dtypes(shape, dtype, device):
    """With the settings that a GPU gets."""
    assert_matches(*cache(device, dtype=DTYPES[dtype], **shape), causal=True, causal_offset=shape.get("S", 100) - 2)


@pytest.mark.parametrize(
    "shape", [{"T": 7, "H": 12, "HK": 1, "S": 90, "B": 1}, {"D": 80, "DV": 130, "H": 2, "B": 1, "S": 90}], ids=str
)
def test_several_tiles_of_rows_and_shares(shape, device):
    assert_matches(*cache(device, **shape), DecodeSettings(32, 16, 4, 4, 2), causal=True, causal_offset=80)


def test_many_shares_are_added_some_at_a_time(device, monkeypatch):
    """Two at a time of seven, the last alone; some of them empty."""
    monkeypatch.setattr("primer_fast.kernels.attention.decode._COMBINED", 32)
    lengths = torch.tensor([40, 97], device=device)
    assert_matches(*cache(device), DecodeSettings(16, 16, 7, 4, 2), key_lengths=lengths)


def test_no_queries_no_keys_no_sequences(device):
    assert call(*cache(device, T=0)).shape == (2, 4, 0, 16)
    assert call(*cache(device, B=0)).shape == (0, 4, 3, 16)
    assert torch.equal(call(*cache(device, S=0)), torch.zeros(2, 4, 3, 16, device=device))


@pytest.mark.parametrize("settings", [None, TILES["three shares"]], ids=["chosen", "three shares"])
def test_what_lies_beyond_the_length_is_never_read(settings, device):
    """The tail of a preallocated cache holds anything, NaN too."""
    q, k, v = cache(device)
    lengths = torch.tensor([41, 7], device=device)
    want = call(q, k, v, settings, key_lengths=lengths)
    for b, length in enumerate(lengths.tolist()):
        k[b, :, length:], v[b, :, length:] = math.nan, math.nan
    assert torch.equal(call(q, k, v, settings, key_lengths=lengths), want) and not want.isnan().any()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("tile", TILES)
def test_nan_and_infinity(tile, device):
    """A NaN of a key that a row sees reaches that row alone; so does an infinite score, whose softmax is NaN."""
    q, k, v = cache(device)
    k[0, 0, 50, 3], k[1, 1, 99, 0] = math.nan, math.inf
    v[0, 1, 20, 5] = math.inf
    got = call(q, k, v, TILES[tile], causal=True, causal_offset=98)
    nan = got.isnan()
    assert nan[0, :2].all() and not nan[0, 2:].any()
    # Of heads 2 and 3 the rows that see key 99, where the score is +inf; -inf is a weight of 0
    infinite = (q[1, 2:, :, 0] > 0) & torch.tensor([False, True, True], device=device)
    assert torch.equal(nan[1, 2:].all(-1), infinite) and not nan[1, :2].any()
    assert got[0, 2:, :, 5].isinf().all() and got[0, 2:, :, :5].isfinite().all()


@pytest.mark.parametrize("layout", ["heads first", "one head of a packed projection", "strided", "expanded keys"])
def test_strides(layout, device):
    q, k, v = cache(device)
    if layout == "heads first":
        q, k, v = (x.contiguous() for x in (q, k, v))
    elif layout == "one head of a packed projection":
        q, k, v = torch.randn(2, 30, 3, 4, 16, device=device).permute(2, 0, 3, 1, 4)
        q = q[:, :, :3]
    elif layout == "strided":
        q, k, v = (x.repeat_interleave(2, -1)[..., ::2] for x in (q, k, v))
    else:
        k, v = k[:1].expand(2, -1, -1, -1), v[:1].expand(2, -1, -1, -1)
    assert_matches(q, k, v, TILES["three shares"], causal=True, causal_offset=20)


@pytest.mark.parametrize("far", ["q", "k", "v", "mask"])
def test_offsets_pass_two_to_the_31(far, far_rows):
    """Row times stride is formed in 64 bits: rows of one argument lie far apart."""
    q, k, v = cache(far_rows.device, B=1, H=1, HK=1, T=5, S=5, dtype=torch.float16)
    mask = torch.randn(1, 1, 5, 5, device=q.device).half()
    arguments = {"q": q, "k": k, "v": v, "mask": mask}
    want = call(**arguments)
    arguments[far] = far_rows[None, None, :, : arguments[far].shape[-1]].copy_(arguments[far])
    assert torch.equal(call(**arguments), want)


def test_two_runs_are_bitwise_equal_and_shares_do_not_depend_on_other_sequences(device):
    q, k, v = cache(device)
    lengths = torch.tensor([93, 58], device=device)
    first, second = (call(q, k, v, TILES["three shares"], key_lengths=lengths) for _ in range(2))
    alone = call(q[:1], k[:1], v[:1], TILES["three shares"], key_lengths=lengths[:1])
    assert torch.equal(first, second) and torch.equal(first[:1], alone)


def test_heads_can_be_merged_without_a_copy(device):
    o = call(*cache(device))
    assert o.transpose(1, 2).reshape(2, 3, 64).data_ptr() == o.data_ptr()


def test_shares_fill_the_chip_where_heads_do_not():
    h100 = CHIPS["sm_90"]
    for heads, rows, S, D in ((64, 4, 8192, 128), (64, 4, 32768, 128), (8, 4, 32768, 128), (12, 1, 1024, 64)):
        s = decode_choice.default(h100, DecodeProblem(heads, rows, S, D, D, 2, False, False))
        programs = heads * s.SPLITS
        assert 0.7 * 2 * 132 <= programs <= 2 * 132 or s.SPLITS * s.BLOCK_N * 2 >= S, (heads, S, s)
    assert decode_choice.default(h100, DecodeProblem(4096, 4, 8192, 128, 128, 2, False, False)).SPLITS == 1
    assert decode_choice.default(h100, DecodeProblem(8, 4, 64, 128, 128, 2, False, False)).SPLITS == 1
