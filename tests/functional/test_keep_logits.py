"""keep_logits of the loss heads: one product less, and logits rounded to the dtype of the input."""

import itertools
import json
import sys

import numpy as np
import pytest
import torch
from compiling import printed_where_kernels_compile
from torch.fx.experimental.proxy_tensor import make_fx

from primer_fast import functional as F
from primer_fast.kernels.device import assume_chip
from primer_fast.kernels.linear_log_prob import linear_log_prob_bwd, linear_log_prob_fwd
from primer_fast.kernels.logits import gradient as logits_gradient
from primer_fast.kernels.product import MatmulSettings
from primer_fast.proof.numerics import exact, worst
from primer_fast.reference.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_grad
from primer_fast.reference.linear_log_prob import linear_log_prob, linear_log_prob_grad

N, D, V = 40, 24, 150
DTYPES = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # of a gradient's largest element


def operands(dtype, device, transposed=False):
    """x, w, b whose logits are exact in float32, reach 40, and need more bits than bfloat16 has."""
    rng = np.random.default_rng(0)
    x, w, b = (rng.integers(-3, 4, (N, D)), rng.integers(-16, 17, (V, D)) / 16, rng.integers(-9, 10, V) / 16)
    x, w, b = (torch.tensor(a, dtype=dtype, device=device) for a in (x, w, b))
    x, w = (t.T.contiguous().T if transposed else t for t in (x, w))
    return [t.requires_grad_() for t in (x, w, b)]


def rounded_logits(x, w, b):
    return exact((x.detach().double() @ w.detach().double().T + b.detach().double()).to(x.dtype))


def products(g, x, w):
    """Gradient at the logits -> of x, w and b."""
    return g @ exact(w), g.T @ exact(x), g.sum(axis=0)


def assert_close(got, want, dtype):
    for a, right in zip(got, want, strict=True):
        assert worst(exact(a), right) <= DTYPES[dtype] * np.abs(right).max()


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("reduction, smoothing", [("none", 0.0), ("mean", 0.1)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy_of_rounded_logits(dtype, reduction, smoothing, transposed, device):
    x, w, b = operands(dtype, device, transposed)
    target = torch.randint(V, (N,), generator=torch.Generator().manual_seed(0))
    target[::7] = -100
    options = {"reduction": reduction, "label_smoothing": smoothing}
    y = F.linear_cross_entropy(x, w, target.to(device), linear_bias=b, keep_logits=True, **options)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    z, rows = rounded_logits(x, w, b), target.numpy()
    want = linear_cross_entropy(z, np.eye(V), rows, **options)
    np.testing.assert_allclose(exact(y), want, rtol=DTYPES[dtype], atol=1e-6)
    g = linear_cross_entropy_grad(exact(dy), z, np.eye(V), rows, **options)["input"]
    assert_close(torch.autograd.grad(y, (x, w, b), dy), products(g, x, w), dtype)


TILES = [
    MatmulSettings(16, 16, 16, 4, 2, SPLITS=1, GROUP_M=1),
    MatmulSettings(32, 64, 32, 4, 2, SPLITS=3, GROUP_M=2, SUBTILES=2),
]


@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
@pytest.mark.parametrize("settings, chunk", list(zip(TILES, (None, (32, 48)), strict=True)), ids=["whole", "chunks"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_prob_and_entropy_of_rounded_logits(dtype, settings, chunk, chip, device):
    """To float32's accuracy in every dtype: were the sums of logits that were not rounded, they would be far off."""
    x, w, b = (t.detach() for t in operands(dtype, device))
    target = torch.randint(V, (N,), device=device)
    dy, dentropy = torch.randn(2, N, device=device)
    with assume_chip(chip):
        y, lse, h, kept = linear_log_prob_fwd(x, w, b, target, 0.8, True, "highest", settings, keep=True)
        grads = linear_log_prob_bwd(
            dy, dentropy, x, w, b, target, lse, h, 0.8, (True, True, True), "highest", settings, chunk, kept
        )
    z, options = rounded_logits(x, w, b), {"temperature": 0.8, "return_entropy": True}
    assert np.array_equal(exact(kept[:, :V]), z) and not kept[:, V:].any()
    rows = target.cpu().numpy()
    for got, right in zip((y, h), linear_log_prob(z, np.eye(V), rows, **options), strict=True):
        assert worst(exact(got), right) < 2e-5 * np.abs(right).max()
    g = linear_log_prob_grad((exact(dy), exact(dentropy)), z, np.eye(V), rows, **options)["input"]
    assert_close(grads, products(g, x, w), dtype)


def both(x, w, b, target, keep):
    y, h = F.linear_log_prob(x, w, target, linear_bias=b, temperature=0.7, return_entropy=True, keep_logits=keep)
    return y.sum() + h.square().sum() + F.linear_cross_entropy(x, w, target, linear_bias=b, keep_logits=keep)


def test_logits_are_made_once(device, monkeypatch):
    x, w, b = operands(torch.float32, device)
    target = torch.randint(V, (N,), device=device)
    want = torch.autograd.grad(both(x, w, b, target, False), (x, w, b))
    loss = both(x, w, b, target, True)
    monkeypatch.delattr(logits_gradient, "_gradient")
    for got in (torch.autograd.grad(loss, (x, w, b), retain_graph=True) for _ in range(2)):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_each_gradient_alone(device):
    x, w, b = operands(torch.float32, device)
    target = torch.randint(V, (N,), device=device)
    want = torch.autograd.grad(both(x, w, b, target, True), (x, w, b))
    for wanted in itertools.product((False, True), repeat=3):
        leaves = [t.detach().requires_grad_(need) for t, need in zip((x, w, b), wanted, strict=True)]
        if any(wanted):
            both(*leaves, target, True).backward()
        for leaf, right, need in zip(leaves, want, wanted, strict=True):
            assert (leaf.grad is not None) == need
            if need:
                torch.testing.assert_close(leaf.grad, right)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("target", [-1, V, -99, 2**40])
def test_a_target_outside_the_vocabulary_gives_nan(target, keep, device):
    x, w, _ = operands(torch.float32, device)
    t = torch.full((N,), 3, device=device)
    t[1] = target
    for function, options in ((F.linear_log_prob, {}), (F.linear_cross_entropy, {"reduction": "none"})):
        y = function(x, w, t, keep_logits=keep, **options)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert y.isnan().nonzero().tolist() == [[1]]
        assert dx.isnan().any(dim=1).nonzero().tolist() == dx.isnan().all(dim=1).nonzero().tolist() == [[1]]


def test_without_a_gradient_nothing_is_kept(device, monkeypatch):
    asked = []
    for op in ("linear_cross_entropy", "linear_log_prob"):
        module, name = sys.modules[f"primer_fast.functional.{op}"], f"{op}_fwd"
        wrapped = getattr(module, name)

        def forward(*args, keep, wrapped=wrapped, **options):
            asked.append(keep)
            return wrapped(*args, keep=keep, **options)

        monkeypatch.setattr(module, name, forward)
    x, w, b = operands(torch.float32, device)
    target = torch.randint(V, (N,), device=device)
    with torch.no_grad():
        both(x, w, b, target, True)
    both(x.detach(), w.detach(), b.detach(), target, True)
    assert asked == [False] * 4
    both(x, w.detach(), b.detach(), target, True)
    assert asked[4:] == [True, True]


def test_a_graph_without_a_gradient_keeps_nothing(device):
    tensors = [t.detach() for t in operands(torch.float32, device)]
    target = torch.randint(V, (N,), device=device)
    graph = make_fx(lambda x, w, b: both(x, w, b, target, True))(*tensors)
    names = {str(node.target) for node in graph.graph.nodes if "primer_fast" in str(node.target)}
    expected = ("linear_log_prob", "linear_cross_entropy", "linear_cross_entropy_reduced")
    assert names == {f"primer_fast.{name}.default" for name in expected}


def test_changes_nothing_on_pytorchs_operators(plain_path, monkeypatch):
    monkeypatch.setattr("primer_fast.functional.logits.PLAIN_BYTES", 0)
    x, w, b = operands(torch.float32, "cpu")
    target = torch.randint(V, (N,))
    got, want = (torch.autograd.grad(both(x, w, b, target, keep), (x, w, b)) for keep in (True, False))
    assert all(map(torch.equal, got, want))


PROBE = """
import json, torch
from primer_fast import functional as F
from primer_fast.kernels.product import MatmulSettings
from primer_fast.kernels.linear_log_prob import linear_log_prob_fwd
from primer_fast.proof.offline import offline

seen = []
for dtype, entropy, D in ((torch.bfloat16, False, 4096), (torch.bfloat16, True, 512), (torch.float32, False, 1024)):
    x, w = (torch.empty(n, D, dtype=dtype, device="meta", requires_grad=True) for n in (8192, 50257))
    b = torch.empty(50257, dtype=dtype, device="meta", requires_grad=True)
    t = torch.empty(8192, dtype=torch.int64, device="meta")
    ours = ("logits_statistics_kernel", "logits_kept_gradient_kernel")
    with offline("sm_90", wanted=lambda kernel: kernel in ours) as launches:
        y = F.linear_log_prob(x, w, t, linear_bias=b, return_entropy=entropy, keep_logits=True)
        y = y[0] + y[1] if entropy else y
        torch.autograd.grad(y, (x, w), torch.empty_like(y))
    whole = MatmulSettings(128, 256, 64, 8, 4)  # kept in one part, for which four stages leave no room
    with offline("sm_90", wanted=lambda kernel: kernel == "logits_statistics_kernel") as too:
        if dtype == torch.bfloat16:
            linear_log_prob_fwd(x, w, None, t, 1.0, entropy, "highest", whole, keep=True)
    for launch in launches + too:
        r = launch.resources()
        seen.append([launch.kernel, r.spill_bytes, r.serialized, sorted(r.stores)])
print(json.dumps(seen))
"""


def test_compiles_for_a_gpu():
    """Tiles to be kept and operands fit shared memory together; nothing spills, no product waits for another."""
    seen = json.loads(printed_where_kernels_compile("-c", PROBE))
    assert {kernel for kernel, *_ in seen} == {"logits_statistics_kernel", "logits_kept_gradient_kernel"}
    assert all(spilled == 0 and serialized is False for _, spilled, serialized, _ in seen), seen
    assert all(stores == ["wide"] for kernel, *_, stores in seen if kernel == "logits_kept_gradient_kernel"), seen
