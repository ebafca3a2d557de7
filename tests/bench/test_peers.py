"""Peers: none is fatal where it cannot run, and those that run here compute the op."""

import inspect
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend

from primer_fast.bench import op as ops
from primer_fast.bench import peers
from primer_fast.bench.ceilings import Ceilings, matmul_precision
from primer_fast.bench.measure import Group, measure_group
from primer_fast.bench.op import EAGER, FORWARD_BACKWARD, OURS, PRECISIONS
from primer_fast.bench.peers import CHUNKED, FLASH, MATH, PEERS, NotAvailable
from primer_fast.bench.timing import WallClock
from primer_fast.reference.case import Case

pytestmark = pytest.mark.usefixtures("plain_path")
HERE = {FLASH, MATH, CHUNKED}  # those that need no GPU
LIMITS = Ceilings(10.0, {"float32": 1.0}, {})
SMALL = {
    "linear": Case("small", "", {"input": (8, 4), "weight": (6, 4), "bias": (6,)}, {"activation": "relu"}),
    "conv2d": Case("small", "", {"input": (1, 2, 6, 6), "weight": (4, 2, 3, 3), "bias": (4,)}, {"activation": "relu"}),
    "scaled_dot_product_attention": Case(
        "small", "", dict.fromkeys(("query", "key", "value"), (1, 2, 9, 8)), {"is_causal": True}
    ),
    "layer_norm": Case("small", "", {"input": (5, 12), "weight": (12,), "bias": (12,)}, {"normalized_shape": 12}),
    "embedding": Case("small", "", {"input": (2, 3), "weight": (7, 4), "position": (3, 4)}, dtypes={"input": "int64"}),
    "linear_cross_entropy": ops.load("linear_cross_entropy").cpu_cases[-1],
    "linear_log_prob": ops.load("linear_log_prob").cpu_cases[-1],
}


def test_every_op_with_peers_puts_them_beside_ours():
    assert PEERS.keys() <= set(ops.names()) and PEERS.keys() == SMALL.keys()
    for name, theirs in PEERS.items():
        providers = ops.load(name).providers
        assert list(providers)[:2] == [OURS, EAGER] and theirs.items() <= providers.items()


@pytest.mark.skipif(torch.cuda.is_available(), reason="they are available")
@pytest.mark.parametrize("name", PEERS)
def test_without_a_gpu_they_say_why_and_the_rest_is_timed(name):
    op = replace(ops.load(name), floor=None)
    group = Group(op, SMALL[name], "float32", FORWARD_BACKWARD, "cpu")
    rows = measure_group(group, WallClock(), LIMITS, 0.001, with_compile=False)
    old = name == "linear_cross_entropy" and not hasattr(torch.nn, "LinearCrossEntropyOptions")  # torch 2.11
    here = {OURS, EAGER, *HERE} - ({CHUNKED} if old else set())
    for row in rows:
        if row.provider in here:
            assert row.status == "ok" and row.error <= 5e-5 and row.median_ms > 0, row
        else:
            assert row.status == "not available" and row.reason and row.median_ms is None, row


def on_a_gpu(monkeypatch):
    monkeypatch.setattr(peers, "on_cuda", lambda tensor, who: None)


def test_cublas_epilogue_is_the_layer_and_has_no_backward(monkeypatch):
    on_a_gpu(monkeypatch)
    x, w, b = torch.randn(8, 4), torch.randn(6, 4), torch.randn(6)
    torch.testing.assert_close(peers.cublas_epilogue(x, w, b, activation="relu"), torch.relu(x @ w.t() + b))
    for refused in ({"activation": "gelu"}, {"activation": None}):
        with pytest.raises(NotAvailable, match="relu or gelu_tanh"):
            peers.cublas_epilogue(x, w, b, **refused)
    with pytest.raises(NotAvailable, match="no derivative"):
        peers.cublas_epilogue(x, w.requires_grad_(), b, activation="relu")


def test_the_searched_convolution_is_the_layer(monkeypatch):
    on_a_gpu(monkeypatch)
    x, w, b = torch.randn(1, 2, 6, 6), torch.randn(4, 2, 3, 3), torch.randn(4)
    want = torch.relu(torch.nn.functional.conv2d(x, w, b, padding=1))
    torch.testing.assert_close(peers.cudnn_searched(x, w, b, padding=1, activation="relu"), want)


def test_math_is_left_out_where_its_scores_are_too_large():
    q = torch.empty(1, 64, 16384, 1, dtype=torch.bfloat16, device="meta")
    with pytest.raises(NotAvailable, match="32 GiB"):
        peers.sdpa(SDPBackend.MATH)(q, q, q)


def test_a_product_that_must_be_exact_is_no_tf32_convolution():
    before = torch.backends.cudnn.allow_tf32
    for name, allowed in (("float32", False), ("tf32", True)):
        with matmul_precision(PRECISIONS[name]):
            assert torch.backends.cudnn.allow_tf32 is allowed
    assert torch.backends.cudnn.allow_tf32 == before


def parameters(function, count):
    return list(inspect.signature(function).parameters)[:count]


def test_liger_is_called_as_it_is_written():
    pytest.importorskip("liger_kernel")
    from liger_kernel.ops import LigerEmbeddingFunction, LigerLayerNormFunction
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    assert parameters(LigerLayerNormFunction.forward, 5) == ["ctx", "X", "W", "B", "eps"]
    assert parameters(LigerEmbeddingFunction.forward, 3) == ["ctx", "embeddings", "indices"]
    assert parameters(liger_fused_linear_cross_entropy, 3) == ["input", "weight", "target"]


def test_cut_cross_entropy_is_called_as_it_is_written(monkeypatch):
    cce = pytest.importorskip("cut_cross_entropy")
    assert parameters(cce.linear_cross_entropy, 3) == ["e", "c", "targets"]
    on_a_gpu(monkeypatch)
    whole = cce.linear_cross_entropy
    monkeypatch.setattr(cce, "linear_cross_entropy", lambda *a, **o: whole(*a, **o, impl="torch_compile"))
    monkeypatch.setattr(torch, "compile", lambda function=None, **options: function)
    op, case = ops.load("linear_log_prob"), SMALL["linear_log_prob"]
    arrays = op.arrays(case, torch.float32, "cpu", torch.Generator().manual_seed(0))
    got = peers.cut_log_prob(**arrays, temperature=0.7)
    torch.testing.assert_close(got, op.providers[EAGER](**arrays, temperature=0.7))
    with pytest.raises(NotAvailable, match="entropy"):
        peers.cut_log_prob(**arrays, return_entropy=True)
