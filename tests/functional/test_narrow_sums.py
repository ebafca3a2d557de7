"""Gradients that are sums over many rows, of 16-bit tensors: summed in float32, on a CPU as on the kernels."""

import pytest
import torch

from primer_fast import functional as F

ROWS = 600  # of ones, of which bfloat16 would count 256


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


ZEROS = torch.zeros(ROWS, dtype=torch.int64)
PEAK = torch.zeros(1, 1, 45, 45).index_fill_(3, torch.tensor([22]), 1)
CASES = {
    "linear": (lambda x, w, b: F.linear(x, w, b, activation="relu"), (normal(ROWS, 8), normal(4, 8), normal(4))),
    "mlp": (lambda x, w, b: F.mlp(x, [w], [b]), (normal(ROWS, 8), normal(4, 8), normal(4))),
    "conv2d": (F.conv2d, (normal(2, 3, 20, 20), normal(4, 3, 3, 3), normal(4))),
    "max_pool2d": (lambda x: F.max_pool2d(x, 19, 1), (PEAK,)),
    "max_pool2d, dilated": (lambda x: F.max_pool2d(x, 19, 1, 0, 2), (PEAK,)),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (8,), w, b), (normal(ROWS, 8), normal(8), normal(8))),
    "layer_norm, bias alone": (lambda x, b: F.layer_norm(x, (8,), None, b), (normal(ROWS, 8), normal(8))),
    "layer_norm, residual": (
        lambda x, s, w: F.layer_norm(x, (8,), w, residual=s), (normal(ROWS, 8), normal(ROWS, 8), normal(8)),
    ),
    "embedding": (lambda w: F.embedding(ZEROS.to(w.device), w), (normal(5, 8),)),
    "embedding, positions": (
        lambda w, p: F.embedding(ZEROS[:, None].to(w.device), w, position=p), (normal(5, 8), normal(1, 8)),
    ),
    "embedding, ids of positions": (
        lambda w, p: F.embedding(ZEROS, w, position=p, position_ids=ZEROS), (normal(5, 8), normal(3, 8)),
    ),
    "attention, shared keys": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        (normal(1, ROWS, 1, 8), normal(1, 1, 4, 8), normal(1, 1, 4, 8)),
    ),
    "attention, shared keys, softcap": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, softcap=3.0, enable_gqa=True),
        (normal(1, ROWS, 1, 8), normal(1, 1, 4, 8), normal(1, 1, 4, 8)),
    ),
    "linear_cross_entropy": (
        lambda x, w, b: F.linear_cross_entropy(x, w, ZEROS, linear_bias=b, reduction="sum"),
        (normal(ROWS, 8), normal(4, 8), normal(4)),
    ),
    "linear_log_prob": (
        lambda x, w, b: F.linear_log_prob(x, w, ZEROS, linear_bias=b), (normal(ROWS, 8), normal(4, 8), normal(4)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_gradients_sum_in_float32(case, dtype, plain_path):
    sums_in_float32(case, dtype, "cpu")


@pytest.mark.parametrize("case", ["layer_norm", "embedding", "embedding, positions"])
def test_kernels_sum_in_float32(case, device):
    got, want = sums_in_float32(case, torch.bfloat16, device)
    assert torch.equal(got[-1].double(), want[-1])  # a sum of ones


def sums_in_float32(case, dtype, device):
    function, leaves = CASES[case]
    leaves = [t.to(device, dtype) for t in leaves]

    def gradients(leaves):
        leaves = [t.requires_grad_() for t in leaves]
        return torch.autograd.grad(function(*leaves).sum(), leaves)

    found = gradients(leaves), gradients([t.double() for t in leaves])
    for got, want in zip(*found, strict=True):
        assert got.dtype == dtype
        bound = 4 * torch.finfo(dtype).eps * want.abs().max().item() + 1e-3
        torch.testing.assert_close(got.double(), want, rtol=0, atol=bound)
    return found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_parameters_beside_16_bits(plain_path, dtype):
    x = torch.tensor([-1.0, -1.0, 1.0, 1.0], dtype=dtype).expand(ROWS, 4)
    w, b = torch.ones(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    for residual in (None, torch.zeros_like(x)):
        w.grad = b.grad = None
        F.layer_norm(x, (4,), w, b, residual=residual).sum().backward()
        assert torch.equal(b.grad, torch.full((4,), float(ROWS)))
        torch.testing.assert_close(w.grad, ROWS * torch.tensor([-1.0, -1.0, 1.0, 1.0]), rtol=2e-3, atol=0)
