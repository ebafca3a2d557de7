"""Gradients of gradients are PyTorch's, or refused."""

import contextlib

import pytest
import torch
import torch.nn.functional as torch_F
from citizenship.ops import CLASSES, OPS, upstream
from torch.nn.attention import SDPBackend, sdpa_kernel

from primer_fast import backend
from primer_fast import functional as F

THEIRS = {name: op.theirs for name, op in OPS.items()}
THEIRS["linear_cross_entropy"] = lambda x, w, b: torch_F.cross_entropy(torch_F.linear(x, w, b), CLASSES.to(x.device))
SMOOTH = [name for name in OPS if name not in ("max_pool2d", "embedding", "embedding position")]


def mathematical():
    """PyTorch's attention whose gradient has a gradient."""
    return sdpa_kernel(SDPBackend.MATH)


def second(function, inputs):
    """The gradients of a penalty on all first gradients; 0 where there is none."""
    y = function(*inputs)
    first = torch.autograd.grad(y, inputs, upstream(y).requires_grad_(), create_graph=True)
    penalty = sum((g.square() * upstream(g)).sum() for g in first)
    return torch.autograd.grad(penalty, inputs, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("name", SMOOTH)
def test_is_torchs(name, place):
    inputs = OPS[name].inputs(torch.float32, place)
    with contextlib.nullcontext() if backend.runs_triton(inputs[0]) else mathematical():
        got = second(OPS[name].ours, inputs)
    with mathematical():
        want = second(THEIRS[name], inputs)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-3, atol=1e-4 * float(max(t.abs().max() for t in want)))
    assert any(w.any() for w in want)


@pytest.mark.parametrize("name", sorted(OPS.keys() - set(SMOOTH)))
def test_of_linear_ops_is_torchs(name, place):
    """The gradient of an op that only picks and adds does not depend on its input, but on what arrives from above."""
    results = []
    for function in (OPS[name].ours, OPS[name].theirs):
        inputs = OPS[name].inputs(torch.float32, place)
        y = function(*inputs)
        dy = upstream(y).requires_grad_()
        first = torch.autograd.grad(y, inputs, dy, create_graph=True)
        results.append(torch.autograd.grad(sum((g.square() * upstream(g)).sum() for g in first), dy))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OPS)
def test_in_float64_by_differences(name):
    with mathematical():
        assert torch.autograd.gradgradcheck(OPS[name].ours, OPS[name].inputs(torch.float64))


def test_attention_on_a_cpu_refuses_as_torch_does(plain_path):
    """PyTorch's choice for CPUs has no second gradient, unless sdpa_kernel chooses the other."""
    op = OPS["scaled_dot_product_attention"]
    for function in (op.ours, op.theirs):
        with pytest.raises(RuntimeError, match=r"derivative for .*attention.* is not implemented"):
            second(function, op.inputs())


def test_attention_with_dropout_refuses(device):
    q, k, v = OPS["scaled_dot_product_attention"].inputs(torch.float32, device)
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    with pytest.raises(NotImplementedError, match="scaled_dot_product_attention: gradients of gradients are not built"):
        torch.autograd.grad(y.sum(), q, create_graph=True)
