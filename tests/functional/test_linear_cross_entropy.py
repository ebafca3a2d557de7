import math
import os
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as torch_F
from compiling import printed_where_kernels_compile
from functional.wrong_calls import refuses

from primer_fast import functional as F
from primer_fast.functional.linear_cross_entropy import linear_cross_entropy_plain
from primer_fast.kernels.linear_cross_entropy import linear_cross_entropy_bwd, linear_cross_entropy_fwd
from primer_fast.kernels.product import MatmulSettings
from primer_fast.proof.numerics import exact, worst
from primer_fast.reference.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_grad


@pytest.fixture
def torch_linear_cross_entropy():
    if not hasattr(torch_F, "linear_cross_entropy"):
        pytest.skip(f"torch {torch.__version__} has no linear_cross_entropy")
    return torch_F.linear_cross_entropy


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_means_what_torch_means(reduction, dtype, autocast, device, torch_linear_cross_entropy):
    x, w, b = (torch.randn(s, device=device, dtype=dtype, requires_grad=True) for s in ((6, 16), (40, 16), (40,)))
    t = torch.tensor([3, 39, -100, 0, -100, 7], device=device)
    results = []
    for function in (F.linear_cross_entropy, torch_linear_cross_entropy):
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            y = function(x, w, t, linear_bias=b, reduction=reduction, ignore_index=None, label_smoothing=0.1)
        results.append((y, *torch.autograd.grad(y, (x, w, b), torch.ones_like(y))))
    precise = dtype == torch.float32 and not autocast
    torch.testing.assert_close(*results, rtol=1e-5 if precise else 3e-2, atol=1e-5 if precise else 3e-2)


@pytest.mark.parametrize("shape", [(16,), (6, 16)], ids=str)
def test_ignored_rows_have_no_gradient(shape, device):
    x, w = (torch.randn(s, device=device, requires_grad=True) for s in (shape, (40, 16)))
    t = torch.full(shape[:-1], -100, device=device)
    y = F.linear_cross_entropy(x, w, t, reduction="none")
    assert y.shape == t.shape and not y.any() and not y.signbit().any()
    for dx in torch.autograd.grad(y, (x, w), torch.ones_like(y)):
        assert not dx.any()


def test_tilings_with_smoothing_give_the_same_answer(device):
    """Shares and chunks with a mean over the whole vocabulary: its size is not a chunk's."""
    N, D, V = 40, 24, 72
    x, w, b = (torch.randn(s, device=device) for s in ((N, D), (V, D), (V,)))
    target, dloss = torch.randint(V, (N,), device=device), torch.randn(N, device=device)
    tile = MatmulSettings(32, 16, 32, 4, 2, SPLITS=4)
    losses, lse, _ = linear_cross_entropy_fwd(x, w, b, target, -100, 0.3, "highest", tile)
    grads = linear_cross_entropy_bwd(
        dloss, x, w, b, target, lse, 0.3, (True, True, True), "highest", tile, chunk=(32, 32)
    )
    options = {"linear_bias": exact(b), "reduction": "none", "label_smoothing": 0.3}
    arrays = exact(x), exact(w), target.cpu().numpy()
    want = [
        linear_cross_entropy(*arrays, **options),
        *linear_cross_entropy_grad(exact(dloss), *arrays, **options).values(),
    ]
    for got, right in zip((losses, *grads), want, strict=True):
        assert worst(exact(got), right) < 2e-5 * np.abs(right).max()


def test_small_logits_are_left_to_torch(plain_path, monkeypatch, torch_linear_cross_entropy):
    """nanoGPT's characters on a CPU: 768 x 65 logits are less than one chunk."""
    monkeypatch.delattr(sys.modules["primer_fast.functional.linear_cross_entropy"], "chunked_fwd")
    x, w, t = torch.randn(768, 8, requires_grad=True), torch.randn(65, 8), torch.randint(65, (768,))
    y = F.linear_cross_entropy(x, w, t)
    assert torch.equal(y, torch_linear_cross_entropy(x, w, t))


def test_chunks_on_pytorch_under_autocast(small_chunks):
    x, w = torch.randn(6, 16, requires_grad=True), torch.randn(40, 16, requires_grad=True)
    t = torch.randint(40, (6,))
    with torch.autocast("cpu", torch.bfloat16):
        y, plain = F.linear_cross_entropy(x, w, t), linear_cross_entropy_plain(x, w, t)
        assert y.dtype == plain.dtype == torch.float32
        got, want = torch.autograd.grad(y, (x, w)), torch.autograd.grad(plain, (x, w))
    torch.testing.assert_close((y, *got), (plain, *want), rtol=3e-2, atol=3e-2)


PEAK = """
import re, sys, torch
from primer_fast.functional import linear_cross_entropy
torch.set_num_threads(1)

def peak():  # not getrusage's, which a child process inherits
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

x, w = torch.empty(1024, 64).normal_().requires_grad_(), torch.empty(50257, 64).normal_(0, 1 / 8).requires_grad_()
t = torch.randint(50257, (1024,))
warm = torch.nn.functional.cross_entropy(torch.randn(8, 8, requires_grad=True) @ torch.randn(8, 8), t[:8] % 8)
warm.backward()
before = peak()
if sys.argv[1] == "ours":
    loss = linear_cross_entropy(x, w, t)
else:
    loss = torch.nn.functional.cross_entropy(torch.nn.functional.linear(x, w), t)
loss.backward()
print(loss.item(), peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the system does not say how much memory was used")
def test_peak_memory_on_a_cpu():
    """Forward and backward at V = 50,257, gradients included: at most a quarter of logits and their cross entropy."""
    peaks = {}
    for which in ("ours", "plain"):
        loss, peaks[which] = map(float, printed_where_kernels_compile("-c", PEAK, which).split())
        assert math.isfinite(loss)
    logits_mib = 1024 * 50257 * 4 / 2**20
    assert peaks["plain"] > 2 * logits_mib, "the measurement sees less than what must be there"
    assert 50257 * 64 * 4 / 2**20 < peaks["ours"] <= peaks["plain"] / 4


ONES, T = torch.ones, torch.zeros(3, dtype=torch.int64)
X, W = ONES(3, 4), ONES(2, 4)
INSTEAD = r"use torch\.nn\.functional\.linear_cross_entropy"
WRONG = [
    (ValueError, r"linear_weight \(2, 5\) and input \(3, 4\)", (X, ONES(2, 5), T), {}),
    (ValueError, r"target \(2,\) and input \(3, 4\)", (X, W, T[:2]), {}),
    (TypeError, r"int64; got torch.int32", (X, W, T.int()), {}),
    (ValueError, r"mean, sum, none; got 'avg'", (X, W, T), {"reduction": "avg"}),
    (ValueError, r"between 0 and 1; got 1.5", (X, W, T), {"label_smoothing": 1.5}),
    (TypeError, r"ignore_index must be an integer or None; got 1.0", (X, W, T), {"ignore_index": 1.0}),
    (TypeError, "loss_dtype must be a floating-point torch.dtype .*'float32'", (X, W, T), {"loss_dtype": "float32"}),
    (NotImplementedError, rf"more axes.*got \(2, 5, 4\); {INSTEAD}", (X, ONES(2, 5, 4), T), {}),
    (NotImplementedError, rf"options.*{INSTEAD}", (X, W, T), {"options": object()}),
]

test_wrong_arguments = refuses("linear_cross_entropy", WRONG)
