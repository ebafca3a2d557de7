import pytest
import torch
from functional.wrong_calls import refuses

from primer_fast import functional as F
from primer_fast.functional.layer_norm import layer_norm_plain
from primer_fast.kernels.device import CHIPS
from primer_fast.kernels.layer_norm import layer_norm_bwd, layer_norm_fwd
from primer_fast.kernels.layer_norm.rows import (
    Rows,
    RowSettings,
    backward_choice,
    backward_fits,
    forward_choice,
    grain_of,
    moves_single,
)
from primer_fast.proof.numerics import budget, exact, worst
from primer_fast.reference.layer_norm import layer_norm, layer_norm_grad

CUTS = [
    RowSettings(1, 256, 4, STAGES=1, programs=1),  # one program walks over all rows
    RowSettings(2, 256, 4, STAGES=3, programs=50),  # more programs than tiles
    RowSettings(4, 32, 4, STAGES=2, CHUNK=4, BLOCK_COLS=16),  # rows that are read in blocks; a last chunk of 3 rows
    RowSettings(2, 128, 4, CHUNK=8, BLOCK_COLS=64),
    RowSettings(8, 64, 4, CHUNK=16, BLOCK_COLS=256),  # one chunk, one block of columns
    RowSettings(8, 64, 4, CHUNK=4, BLOCK_COLS=32),  # tiles higher than a chunk
]


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "no residual"])
@pytest.mark.parametrize("settings", CUTS, ids=lambda s: "x".join(map(str, s)))
def test_every_way_to_cut_rows_gives_the_same_answer(settings, residual, device):
    """Blocks are chosen by size; here each is forced on sizes that it does not divide."""
    rows, N = 11, 147
    x, r, dy, dsum = (2 * torch.randn(rows, N, device=device) + 1 for _ in range(4))
    w, b = torch.randn(N, device=device), torch.randn(N, device=device)
    r, dsum = (r, dsum) if residual else (None, None)
    y, s, mean, rstd = layer_norm_fwd(x, r, w, b, N, 0.5, settings=settings)
    f32 = torch.float32
    ds, dw, db = layer_norm_bwd(
        dy, dsum, x if s is None else s, mean, rstd, w, N, dtype=f32, dweight=f32, dbias=f32, settings=settings
    )
    arrays = {"input": exact(x), "weight": exact(w), "bias": exact(b)}
    options = {"normalized_shape": N, "eps": 0.5, "return_residual": residual}
    options |= {"residual": exact(r)} if residual else {}
    want = layer_norm(**arrays, **options)
    upstream = (exact(dy), exact(dsum)) if residual else exact(dy)
    want = {"y": want[0] if residual else want} | layer_norm_grad(upstream, **arrays, **options)
    for name, got in {"y": y, "input": ds, "weight": dw, "bias": db}.items():
        assert worst(exact(got), want[name]) < 5e-5, name
    if residual:
        assert torch.equal(s, x + r)


@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
@pytest.mark.parametrize("N", [1, 24, 768, 1024, 4096, 8192, 8193, 32768, 65536, 200_000])
def test_settings_fit_registers_and_shared_memory(N, chip):
    """What the compiler was seen to hold without spilling: 64 elements a thread forward, 16 beside dw and db."""
    gpu = CHIPS[chip]
    settings = forward_choice.default(gpu, Rows(4096, N, 2))
    held = settings.BLOCK_ROWS * settings.BLOCK_N // (32 * settings.num_warps)
    assert held <= 64 and settings.num_warps <= 16 and (settings.BLOCK_N >= N or N > 32768)
    for itemsize in (2, 4):
        settings = backward_choice.default(gpu, Rows(4096, N, itemsize))
        assert backward_fits(gpu, Rows(4096, N, itemsize), settings)
        if N <= 8192:
            assert settings.BLOCK_N >= N and gpu.processors <= settings.programs <= 4 * gpu.processors
        else:
            assert settings.CHUNK * N * itemsize * 2 <= 2**23 or settings.CHUNK == 32, "dy and s of a chunk fit L2"
            assert (settings.STAGES - 1) * 2 * settings.BLOCK_ROWS * settings.BLOCK_COLS * itemsize <= 2**16
    assert backward_choice.default(CHIPS["sm_90"], Rows(4096, N, 2)).STAGES == 3


@pytest.mark.parametrize("settings", [None, RowSettings(2, 16, 4, CHUNK=4, BLOCK_COLS=32)], ids=["held", "read twice"])
def test_each_gradient_alone_is_that_of_all_together(settings, device):
    """What is not asked for is neither computed nor allocated."""
    N = 40
    x, dy = torch.randn(9, N, device=device), torch.randn(9, N, device=device)
    w = torch.randn(N, device=device)
    _, _, mean, rstd = layer_norm_fwd(x, None, w, None, N, 1e-5)
    names = ("dtype", "dweight", "dbias")
    together = layer_norm_bwd(dy, None, x, mean, rstd, w, N, **dict.fromkeys(names, torch.float32), settings=settings)
    for i, name in enumerate(names):
        s = None if name == "dbias" else x
        alone = layer_norm_bwd(dy, None, s, mean, rstd, w, N, **{name: torch.float32}, settings=settings)
        assert torch.equal(alone[i], together[i])
        assert [t is None for t in alone] == [j != i for j in range(3)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_tile_in_parts_gives_the_same_answer(dtype, device):
    """64 elements a thread, as rows of 32,768 have; the last part has no column."""
    x, r = (torch.randn(3, 900, device=device).to(dtype) for _ in range(2))
    w, b = (torch.randn(900, device=device).to(dtype) for _ in range(2))
    got, want = (
        layer_norm_fwd(x, r, w, b, 900, 1e-5, settings=RowSettings(1, width, warps))
        for width, warps in ((2048, 1), (1024, 4))
    )
    assert torch.equal(got[1], want[1])
    torch.testing.assert_close(got, want, rtol=1e-5 if dtype is torch.float32 else 1e-2, atol=1e-5)


def test_common_divisors_are_told_to_the_compiler():
    """Triton sees of itself whether 16 divides a size; elements that move one by one get smaller tiles."""
    x = torch.empty(4, 5000, dtype=torch.bfloat16)
    assert [grain_of(n, x[:, :n], None) for n in (4096, 5000, 4992, 4994, 4999)] == [8, 8, 8, 2, 1]
    assert grain_of(4096, torch.empty(4, 4096)) == 1 and grain_of(4096, torch.empty(4, 4112)) == 1
    single = [moves_single(n, x[:, i : i + n]) for n, i in ((4096, 0), (4096, 1), (4096, 2), (4999, 0), (4998, 0))]
    assert single == [False, True, False, True, False]
    gpu = CHIPS["sm_90"]
    for N in (99, 1001, 4095, 4999, 32769):
        settings, wide = (backward_choice.default(gpu, Rows(4096, N, 2, single=single)) for single in (True, False))
        assert backward_fits(gpu, Rows(4096, N, 2, single=True), settings)
        assert settings.BLOCK_ROWS * (settings.BLOCK_COLS or settings.BLOCK_N) <= 8 * 32 * settings.num_warps
        assert bool(settings.CHUNK) == (N > 4096) and bool(wide.CHUNK) == (N > 8192)


def test_the_variance_does_not_cancel(device):
    """Blocks of a long row too: means 30,000 and a deviation of 1."""
    x = 30000 + torch.randn(3, 200, device=device)
    x[:, 100:] += 2
    want = layer_norm(exact(x), 200)
    for settings in (None, RowSettings(1, 64, 4)):
        y, *_ = layer_norm_fwd(x, None, None, None, 200, 1e-5, settings=settings)
        assert worst(exact(y), want) < 5e-3  # half a unit of float32 at 30,000 is 1e-3


@pytest.mark.parametrize("settings", [None, RowSettings(2, 16, 4)], ids=["held", "looped"])
def test_nan_and_infinity_stay_in_their_rows(settings, device):
    x = torch.randn(4, 40, device=device)
    x[1, 3], x[2, 39] = float("nan"), float("inf")
    y, *_ = layer_norm_fwd(x, None, None, None, 40, 1e-5, settings=settings)
    plain = torch.nn.functional.layer_norm(x, (40,))
    assert torch.equal(y.isnan(), plain.isnan()) and y.isnan().any(1).tolist() == [False, True, True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_parameters_beside_16_bits(dtype, device):
    x, dy = (torch.randn(6, 40, device=device).to(dtype) for _ in range(2))
    w, b = (torch.randn(40, device=device, requires_grad=True) for _ in range(2))
    x.requires_grad_()
    y = F.layer_norm(x, 40, w, b)
    plain = torch.nn.functional.layer_norm(x.float(), (40,), w, b)
    got, want = torch.autograd.grad(y, (x, w, b), dy), torch.autograd.grad(plain, (x, w, b), dy.float())
    assert [t.dtype for t in (y, *got)] == [dtype, dtype, torch.float32, torch.float32]
    arrays = [exact(t) for t in (x, w, b)]
    assert worst(exact(y), layer_norm(arrays[0], 40, *arrays[1:])) <= budget(dtype, 0.0, exact(plain))
    torch.testing.assert_close(got[0].float(), want[0].float(), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(got[1:], want[1:], rtol=1e-4, atol=1e-4)


def test_a_float32_residual_beside_16_bits_is_promoted_as_in_torch(device):
    x = torch.randn(6, 40, device=device, dtype=torch.bfloat16, requires_grad=True)
    r, w = torch.randn(6, 40, device=device, requires_grad=True), torch.randn(40, device=device, requires_grad=True)
    dy, dsum = torch.randn(6, 40, device=device), torch.randn(6, 40, device=device)
    got = F.layer_norm(x, 40, w, residual=r, return_residual=True)
    want = layer_norm_plain(x, 40, w, residual=r, return_residual=True)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    grads = (torch.autograd.grad(t, (x, r, w), (dy, dsum)) for t in (got, want))
    torch.testing.assert_close(*grads, rtol=1e-2, atol=1e-2)


def test_the_sum_is_rounded_before_it_is_normalised(device):
    """As in PyTorch, and whether or not the sum is kept."""
    x, r = (torch.randn(8, 64, device=device, dtype=torch.bfloat16) for _ in range(2))
    alone = F.layer_norm(x, 64, residual=r)
    y, s = F.layer_norm(x, 64, residual=r, return_residual=True)
    assert torch.equal(s, x + r) and torch.equal(y, alone) and torch.equal(y, F.layer_norm(s, 64))


def test_without_a_residual_the_input_is_returned(device):
    x = torch.randn(6, 40, device=device, requires_grad=True)
    y, s = F.layer_norm(x, 40, return_residual=True)
    assert s is x
    (dx,) = torch.autograd.grad((y.square().sum(), s.sum()), x)
    plain, _ = layer_norm_plain(x, 40, return_residual=True)
    torch.testing.assert_close(dx, torch.autograd.grad(plain.square().sum(), x)[0] + 1)


def test_outputs_that_are_not_used(device):
    x, r, w = (torch.randn(s, device=device, requires_grad=True) for s in ((6, 40), (6, 40), (40,)))
    y, s = F.layer_norm(x, 40, w, residual=r, return_residual=True)
    got = torch.autograd.grad(s.sum(), (x, r, w), retain_graph=True, allow_unused=True)
    assert torch.equal(got[0], torch.ones_like(x)) and torch.equal(got[1], got[0]) and got[2] is None
    dy = torch.randn_like(y)
    plain = layer_norm_plain(x, 40, w, residual=r)
    torch.testing.assert_close(torch.autograd.grad(y, (x, r, w), dy), torch.autograd.grad(plain, (x, r, w), dy))


def test_rows_apart_in_memory_are_read_in_place(device, monkeypatch):
    x = torch.randn(7, 100, device=device)[:, 10:50]
    copied, contiguous = [], torch.Tensor.contiguous
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda t, *a, **k: copied.append(t) or contiguous(t, *a, **k))
    y = F.layer_norm(x, 40)
    assert copied == [] and y.is_contiguous()
    torch.testing.assert_close(y, layer_norm_plain(x, 40))


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_bias_that_learns_alone_keeps_no_sum(create_graph, device):
    x, r, dy = (torch.randn(5, 16, device=device) for _ in range(3))
    b = torch.randn(16, device=device, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = F.layer_norm(x, 16, bias=b, residual=r)
    assert all(t.shape != x.shape for t in kept)
    (db,) = torch.autograd.grad(y, b, dy, create_graph=create_graph)
    torch.testing.assert_close(db, dy.sum(0), rtol=1e-5, atol=1e-5)


def test_a_float32_output_of_16_bits(device):
    """What autocast asks the kernel for on a GPU."""
    x, w = torch.randn(6, 40, dtype=torch.bfloat16, device=device), torch.randn(40, device=device)
    y, *_ = layer_norm_fwd(x, None, w, None, 40, 1e-5, dtype=torch.float32)
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x.float(), (40,), w))


ONES = torch.ones
WRONG = [
    (ValueError, r"at least one; got \(\) and input \(3, 4\)", (ONES(3, 4), ()), {}),
    (ValueError, r"got \(5,\) and input \(3, 4\)", (ONES(3, 4), 5), {}),
    (ValueError, r"got \(1,\) and input \(\)", (torch.tensor(1.0), 1), {}),
    (ValueError, r"got \(2, 3, 4\) and input \(3, 4\)", (ONES(3, 4), (2, 3, 4)), {}),
    (ValueError, r"weight must have shape \(4,\), normalized_shape; got \(3,\)", (ONES(3, 4), 4, ONES(3)), {}),
    (ValueError, r"bias must have shape \(3, 4\)", (ONES(3, 4), (3, 4), None, ONES(4)), {}),
    (ValueError, r"residual must .*; got torch.float32 \(4,\)", (ONES(3, 4), 4), {"residual": ONES(4)}),
    (ValueError, r"weight meta", (ONES(3, 4), 4, torch.ones(4, device="meta")), {}),
    (TypeError, r"weight must have the dtype .*; got torch.float16 and torch.float32", (ONES(3, 4), 4, ONES(4).half()),
     {}),
    (TypeError, r"input must be a tensor; got list", ([1.0], 1), {}),
    (TypeError, r"residual must be a tensor; got float", (ONES(3, 4), 4), {"residual": 0.0}),
    (TypeError, r"input must hold floating-point numbers; got torch.int32", (ONES(3, 4).int(), 4), {}),
    (TypeError, r"normalized_shape must be an integer or several; got \(4.0,\)", (ONES(3, 4), (4.0,)), {}),
]  # fmt: skip

test_wrong_arguments = refuses("layer_norm", WRONG)


@pytest.mark.parametrize(
    "settings",
    [RowSettings(1, 64, 4, programs=1), RowSettings(2, 16, 4, CHUNK=2, BLOCK_COLS=32)],
    ids=["held", "blocks"],
)
def test_offsets_pass_two_to_the_31(settings, far_rows):
    """Row times stride is formed in 64 bits."""
    rows = len(far_rows)
    far = [far_rows[:, i * 48 : i * 48 + 40] for i in range(3)]
    for t in far:
        t.copy_(torch.randn(rows, 40, device=far_rows.device))
    results = []
    for s, dy, dsum in (far, [t.contiguous().clone() for t in far]):
        y, _, mean, rstd = layer_norm_fwd(s, None, None, None, 40, 1e-5, settings=settings)
        dtypes = dict.fromkeys(("dtype", "dweight", "dbias"), torch.float32)
        results.append((y, mean, rstd, *layer_norm_bwd(dy, dsum, s, mean, rstd, None, 40, **dtypes, settings=settings)))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float16), (torch.float16, torch.float32)], ids=str)
def test_weight_and_bias_of_two_dtypes(dtypes, either):
    x, w, b = (torch.randn(s, device=either) for s in ((5, 16), 16, 16))
    x, w, b = x.half(), w.to(dtypes[0]), b.to(dtypes[1])
    want = torch.nn.functional.layer_norm(x.double(), (16,), w.double(), b.double())
    torch.testing.assert_close(F.layer_norm(x, (16,), w, b).double(), want, rtol=2e-3, atol=2e-3)
