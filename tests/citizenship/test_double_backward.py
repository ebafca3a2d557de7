"""Gradients of gradients are PyTorch's, or refused."""

import pytest
import torch
from catalogue import ATTENTION, GROWING, OPS, SAMPLES, results, upstream
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from primer_fast import functional as F


def mathematical():
    """PyTorch's attention whose gradient has a gradient."""
    return sdpa_kernel(SDPBackend.MATH)


def second(call, tensors):
    """The gradients of a penalty on results and first gradients, for leaves and upstream gradients."""
    leaves = [t for t in tensors if t.requires_grad]
    outputs = [y for y in results(call(*tensors)) if y.requires_grad]
    dy = [upstream(y).requires_grad_() for y in outputs]
    first = torch.autograd.grad(outputs, leaves, dy, create_graph=True)
    penalty = sum(y.pow(3).sum() for y in outputs) + sum((g.square() * upstream(g)).sum() for g in first)
    return torch.autograd.grad(penalty, [*leaves, *dy], allow_unused=True, materialize_grads=True)


# PyTorch's operators draw another dropout
TWICE = [s for s in SAMPLES if s.why not in ("no gradient", "decoding", "no tokens", "dropout")]


@pytest.mark.parametrize("sample", TWICE, ids=str)
def test_is_torchs(sample, device, request):
    got = second(sample.call, sample.make(device, torch.float32))
    request.getfixturevalue("plain_path")
    with mathematical():
        want = second(sample.theirs or sample.call, sample.make("cpu", torch.float32))
    for g, w in zip(got, want, strict=True):
        largest = w.abs().max().item() if w.numel() else 0
        torch.testing.assert_close(g.cpu(), w, rtol=1e-3, atol=1e-3 * max(1.0, largest))


class NothingChanges(TorchDispatchMode):
    """A mode that changes nothing; under it every call is an operator of torch.library."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", GROWING)
def test_of_operators_is_that_of_eager(op, device):
    sample = GROWING[op]
    want = second(sample.call, sample.make(device))
    with NothingChanges():
        got = second(sample.call, sample.make(device))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", OPS)
def test_in_float64_by_differences(name):
    with mathematical():
        assert torch.autograd.gradgradcheck(OPS[name].ours, OPS[name].floats(torch.float64), fast_mode=True)


def test_attention_on_a_cpu_refuses_as_torch_does(plain_path):
    """PyTorch's choice for CPUs has no second gradient, unless sdpa_kernel chooses the other."""
    op = OPS[f"{ATTENTION}: causal"]
    for function in (op.ours, op.torchs):
        with pytest.raises(RuntimeError, match=r"derivative for .*attention.* is not implemented"):
            second(function, op.floats())


def test_attention_with_dropout_refuses(device):
    q, k, v = OPS[f"{ATTENTION}: causal"].floats(torch.float32, device)
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    with pytest.raises(NotImplementedError, match="scaled_dot_product_attention: gradients of gradients are not built"):
        torch.autograd.grad(y.sum(), q, create_graph=True)
