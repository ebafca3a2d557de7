import numpy as np
import pytest
import torch
from compiling import printed_where_kernels_compile
from functional.wrong_calls import refuses

from primer_fast import functional as F
from primer_fast.functional.linear_log_prob import linear_log_prob_plain
from primer_fast.kernels.device import CHIPS, assume_chip
from primer_fast.kernels.linear_log_prob import linear_log_prob_bwd, linear_log_prob_fwd
from primer_fast.kernels.logits.gradient import CHUNK_BYTES, chunk_size
from primer_fast.kernels.logits.statistics import share_count
from primer_fast.kernels.matmul import matmul
from primer_fast.kernels.product import MatmulSettings
from primer_fast.proof.numerics import exact, worst
from primer_fast.reference.linear_log_prob import linear_log_prob, linear_log_prob_grad

TILES = [
    MatmulSettings(16, 16, 16, 4, 2, SPLITS=1, GROUP_M=1),
    MatmulSettings(32, 64, 32, 4, 2, SPLITS=3, GROUP_M=2),
    MatmulSettings(64, 32, 64, 4, 3, SPLITS=7, GROUP_M=3, SUBTILES=2),  # more shares than tiles: some have none
]


@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    "settings, chunk", list(zip(TILES, (None, (32, 48), (100, 32)), strict=True)), ids=["one chunk", "both", "classes"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_tiling_gives_the_same_answer(settings, chunk, chip, dtype, device):
    """Tiles, shares and chunks are chosen by size; here each is forced on sizes that it does not divide."""
    N, D, V = 40, 24, 72
    x, w, b = (torch.randn(s, device=device, dtype=dtype) for s in ((N, D), (V, D), (V,)))
    w /= D**0.5
    target = torch.randint(V, (N,), device=device)
    dy, dentropy = torch.randn(2, N, device=device)
    with assume_chip(chip):
        y, lse, entropy, _ = linear_log_prob_fwd(x, w, b, target, 0.8, True, "highest", settings)
        grads = linear_log_prob_bwd(
            dy, dentropy, x, w, b, target, lse, entropy, 0.8, (True, True, True), "highest", settings, chunk
        )
    options = {"linear_bias": exact(b), "temperature": 0.8, "return_entropy": True}
    arrays, upstream = (exact(x), exact(w), target.cpu().numpy()), (exact(dy), exact(dentropy))
    want = [*linear_log_prob(*arrays, **options), *linear_log_prob_grad(upstream, *arrays, **options).values()]
    for got, right in zip((y, entropy, *grads), want, strict=True):
        # float16: half a unit of every gradient at the logits and of the result
        tolerance = 2e-5 if got.dtype == torch.float32 and dtype == torch.float32 else 2e-3
        assert worst(exact(got), right) < tolerance * max(1, np.abs(right).max())


@pytest.mark.parametrize("target", [0, 15, 16, 31, 32, 39])
def test_a_target_alone_at_the_edge_of_a_tile(target, device):
    """Tiles of 16 classes look for the target where one of their rows has it among them, the last one in 8 classes."""
    x, w = torch.randn(1, 24, device=device), torch.randn(40, 24, device=device)
    t, dy, tile = torch.tensor([target], device=device), torch.ones(1, device=device), TILES[0]
    y, lse, *_ = linear_log_prob_fwd(x, w, None, t, 1.0, False, "highest", tile)
    dx, *_ = linear_log_prob_bwd(dy, None, x, w, None, t, lse, None, 1.0, (True, False, False), "highest", tile)
    arrays = exact(x), exact(w), t.cpu().numpy()
    assert worst(exact(y), linear_log_prob(*arrays)) < 1e-4
    assert worst(exact(dx), linear_log_prob_grad(exact(dy), *arrays)["input"]) < 1e-4


PROBE = """
import torch
from primer_fast.functional import linear_log_prob
from primer_fast.proof.offline import offline

x, w = (torch.empty(n, 768, dtype=torch.bfloat16, device="meta", requires_grad=True) for n in (16384, 50257))
t = torch.empty(16384, dtype=torch.int64, device="meta")
ours = ("logits_statistics_kernel", "logits_gradient_kernel")
with offline("sm_90", wanted=lambda kernel: kernel in ours) as launches:
    y, h = linear_log_prob(x, w, t, return_entropy=True)
    torch.autograd.grad(y + h, x, torch.empty_like(y))
for launch in launches[:2]:
    r = launch.resources()
    print(launch.kernel, r.spill_bytes, r.programs_per_processor)
"""


def test_small_tiles_share_a_multiprocessor():
    """The estimate counts on two programs there, of which one multiplies while the other does not."""
    seen = printed_where_kernels_compile("-c", PROBE).splitlines()
    assert seen == ["logits_statistics_kernel 0 2", "logits_gradient_kernel 0 2"]


def test_an_addend_is_added_in_float32(device):
    a, b, total = (torch.randn(s, device=device) for s in ((40, 600), (24, 600), (40, 24)))
    want = exact(total) + exact(a) @ exact(b).T
    for splits in (1, 3):
        tile = MatmulSettings(32, 32, 32, 4, 2, SPLITS=splits)
        for chip in ("sm_80", "sm_90"):
            with assume_chip(chip):
                low = torch.empty(40, 24, device=device, dtype=torch.bfloat16)
                matmul(a, b, "highest", out=low, addend=total, settings=tile)
                into = total.clone()
                matmul(a, b, "highest", out=into, addend=into, settings=tile)
            assert worst(exact(into), want) < 1e-4
            torch.testing.assert_close(low, into.bfloat16(), rtol=1e-2, atol=1e-2)


def test_chunks_are_bounded_and_cover_the_vocabulary():
    for rows in (1, 300, 8192, 10**6):
        for classes in (1, 65, 50257, 151936):
            for itemsize in (2, 4):
                n, c = chunk_size(rows, classes, itemsize)
                assert n * c * itemsize <= CHUNK_BYTES and 1 <= n <= rows and c >= min(classes, 256)
    assert chunk_size(8192, 151936, 2) == (8192, 15360)


def test_shares_fill_the_chip():
    tile = MatmulSettings(128, 256, 64, 8, 4)
    for rows, classes in ((1, 131072), (8192, 131072), (8192, 151936), (16384, 50257), (16384, 65)):
        n, tiles, blocks = share_count(CHIPS["sm_90"], tile, rows, classes), -(-classes // 256), -(-rows // 128)
        assert 1 <= n <= tiles
        turns = -(-blocks * n // 132) * -(-tiles // n)
        assert turns <= 1.1 * blocks * tiles / 132 or n == tiles


def test_nan_and_infinity_go_where_the_formula_sends_them(device):
    inf, nan = float("inf"), float("nan")
    bias = torch.randn(7, 70, device=device)
    bias[1, 5], bias[2, 69], bias[3, 0], bias[4], bias[5, 1:] = nan, inf, -inf, -inf, -inf
    x, w = torch.zeros(1, 8, device=device), torch.zeros(70, 8, device=device)
    for b in bias:
        for t in (0, 5):
            b, dy = b.detach().requires_grad_(), torch.tensor([2.0], device=device)
            results = []
            for function in (F.linear_log_prob, linear_log_prob_plain):
                y, h = function(x, w, torch.tensor([t], device=device), linear_bias=b, return_entropy=True)
                results.append((y, h, *torch.autograd.grad((y, h), b, (dy, -dy))))
            torch.testing.assert_close(*results, equal_nan=True, rtol=1e-5, atol=1e-6)


def test_one_of_two_outputs_alone_and_expanded_upstream(device):
    x, w = (torch.randn(s, device=device, requires_grad=True) for s in ((12, 24), (70, 24)))
    t = torch.randint(70, (12,), device=device)
    for output in (0, 1):
        got, want = (
            torch.autograd.grad(f(x, w, t, return_entropy=True)[output].sum(), (x, w))
            for f in (F.linear_log_prob, linear_log_prob_plain)
        )
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_tied_weights_add_up(device):
    """One tensor embeds and unembeds; its gradient is the sum of both."""
    w, t = torch.randn(65, 16, device=device, requires_grad=True), torch.arange(12, device=device)
    got, want = (
        torch.autograd.grad(f(torch.nn.functional.embedding(t, w), w, t + 1).sum(), w)[0]
        for f in (F.linear_log_prob, linear_log_prob_plain)
    )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


ONES, T = torch.ones, torch.zeros(3, dtype=torch.int64)
X, W = ONES(3, 4), ONES(2, 4)
WRONG = [
    (ValueError, r"linear_weight \(2, 5\) and input \(3, 4\)", (X, ONES(2, 5), T), {}),
    (ValueError, r"linear_weight \(4,\)", (X, ONES(4), T), {}),
    (ValueError, r"at least one row; got \(0, 4\)", (X, ONES(0, 4), T), {}),
    (ValueError, r"target \(2,\) and input \(3, 4\)", (X, W, T[:2]), {}),
    (ValueError, r"linear_bias \(3,\)", (X, W, T), {"linear_bias": ONES(3)}),
    (TypeError, r"int64; got torch.int32", (X, W, T.int()), {}),
    (TypeError, r"input torch.float32 and linear_weight torch.float16", (X, W.half(), T), {}),
    (TypeError, r"floating-point numbers; got torch.int64", (X.long(), W.long(), T), {}),
    (TypeError, r"target must be a tensor; got list", (X, W, [0, 1, 1]), {}),
    (TypeError, r"input must be a tensor; got list", ([1.0], W, T), {}),
    (ValueError, r"linear_weight meta", (X, torch.ones(2, 4, device="meta"), T), {}),
    (ValueError, r"positive number, from 1e-30 to 1e30; got 0", (X, W, T), {"temperature": 0}),
    (ValueError, r"1e-30 to 1e30; got nan", (X, W, T), {"temperature": float("nan")}),
    (ValueError, r"1e-30 to 1e30; got 1e-42", (X, W, T), {"temperature": 1e-42}),
    (ValueError, r"1e-30 to 1e30; got 1e\+300", (X, W, T), {"temperature": 1e300}),
    *((TypeError, f"must be an integer or None; got {n!r}", (X, W, T), {"ignore_index": n}) for n in (1.0, True, "x")),
]

test_wrong_arguments = refuses("linear_log_prob", WRONG)


def test_offsets_pass_two_to_the_31(far_rows):
    """Row times stride is formed in 64 bits."""
    device, classes = far_rows.device, len(far_rows)
    w = far_rows[:, :16]
    w.copy_(torch.eye(classes, 16, device=device) * torch.arange(1, 6, device=device)[:, None])
    x, t = torch.ones(1, 16, dtype=torch.float16, device=device), torch.tensor([4], device=device)
    with assume_chip("sm_80"):
        y = F.linear_log_prob(x, w, t)
    assert worst(exact(y), linear_log_prob(exact(x), exact(w), t.cpu().numpy())) < 1e-5
