"""Forward-mode differentiation: every op gives PyTorch's tangent, or refuses; none returns a result without one."""

import pytest
import torch
from catalogue import OPS, SAMPLES, results, upstream
from torch.autograd import forward_ad
from torch.autograd.functional import hessian
from torch.nn.attention import SDPBackend, sdpa_kernel

from primer_fast import functional as F
from primer_fast.functional import logits

ops = pytest.mark.parametrize("name", OPS)


def drawn(name, place):
    """-> inputs, and a tangent for each."""
    return [[x.detach() for x in OPS[name].floats(torch.float32, place, seed)] for seed in (0, 3)]


def tangent(function, inputs, tangents, *, requires_grad=False):
    with forward_ad.dual_level():
        leaves = [x.clone().requires_grad_(requires_grad) for x in inputs]
        return forward_ad.unpack_dual(function(*map(forward_ad.make_dual, leaves, tangents))).tangent


def theirs(name):
    def mathematical(*inputs):  # PyTorch's other attention has no forward derivative
        with sdpa_kernel(SDPBackend.MATH):
            return OPS[name].torchs(*inputs)

    return mathematical


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.why != "dropout"], ids=str)
def test_tangent_is_torchs(sample, requires_grad, place):
    """By central differences in float64, and whatever kernel PyTorch would choose for attention."""
    others = sample.others(place)
    inputs, tangents = ([x.detach() for x in sample.floats(torch.float32, place, seed)] for seed in (0, 3))

    def call(*floats):
        return tuple(y for y in results(sample.call(*others, *floats)) if y.is_floating_point())

    if str(sample) == "linear: plain":
        for _ in range(2):  # from the third call on, a prepared launcher would run
            call(*(x.clone().requires_grad_(requires_grad) for x in inputs))
    h = 1e-6
    moved = ([x.double() + s * t.double() for x, t in zip(inputs, tangents, strict=True)] for s in (h, -h))
    want = [((ahead - behind) / (2 * h)).float() for ahead, behind in zip(*(call(*m) for m in moved), strict=True)]
    with forward_ad.dual_level():
        leaves = [x.clone().requires_grad_(requires_grad) for x in inputs]
        outputs = call(*map(forward_ad.make_dual, leaves, tangents))
        close([forward_ad.unpack_dual(y).tangent for y in outputs], want)


@ops
def test_gradient_of_a_dual_upstream(name, device):
    """The forward ran before the level was opened: the kernels did it."""
    inputs, _ = drawn(name, device)
    found = []
    for function, create_graph in ((OPS[name].ours, False), (theirs(name), True)):  # silu's has a tangent so alone
        leaves = [x.clone().requires_grad_() for x in inputs]
        y = function(*leaves)
        with forward_ad.dual_level():
            dy = forward_ad.make_dual(upstream(y), upstream(y).cos())
            grads = torch.autograd.grad(y, leaves, dy, create_graph=create_graph)
            assert create_graph or not any(g.requires_grad for g in grads)
            found.append([forward_ad.unpack_dual(g).tangent for g in grads])
    close(*found)


@ops
def test_several_gradients_at_once(name, device):
    leaves = OPS[name].floats(torch.float32, device)
    y = OPS[name].ours(*leaves)
    several = torch.stack([upstream(y), upstream(y).cos()])
    got = torch.autograd.grad(y, leaves, several, is_grads_batched=True, retain_graph=True)
    want = [torch.autograd.grad(y, leaves, dy, retain_graph=True) for dy in several]
    close(list(got), [torch.stack(g) for g in zip(*want, strict=True)])


@pytest.mark.parametrize("name", ["linear_cross_entropy: mean", "linear_log_prob: bias"])
def test_logits_that_would_be_made_in_chunks(name, plain_path, monkeypatch):
    monkeypatch.setattr(logits, "PLAIN_BYTES", 0)
    inputs, tangents = drawn(name, "cpu")
    close(tangent(OPS[name].ours, inputs, tangents), tangent(theirs(name), inputs, tangents))


def test_second_derivatives(place):
    """Forward over reverse, by torch.func and by torch.autograd.functional, and reverse over reverse."""
    x, w, b = drawn("linear: gelu", place)[0]
    ours, want = (lambda x, f=f: f(x, w, b).sin().sum() for f in (OPS["linear: gelu"].ours, OPS["linear: gelu"].torchs))
    want = torch.func.hessian(want)(x)
    close(torch.func.hessian(ours)(x), want)
    close(hessian(ours, x, vectorize=True, outer_jacobian_strategy="forward-mode"), want)
    close(hessian(ours, x, vectorize=True), want)
    _, along = torch.func.linearize(torch.func.grad(ours), x)
    close(along(x.cos()), torch.einsum("abcdef,def->abc", want, x.cos()))


def test_max_pool_whose_windows_reach_past_the_image(place):
    x = torch.randn(1, 2, 8, 8, device=place)
    pool = lambda x: F.max_pool2d(x, 3, 2, 1, 3, ceil_mode=True)  # noqa: E731
    close(tangent(pool, [x], [x.square()]), torch.where(pool(x) == -torch.inf, 0, pool(x).square()))


def test_compiled_before_or_in_the_level(place):
    inputs, tangents = drawn("linear: gelu", place)
    want = tangent(OPS["linear: gelu"].torchs, inputs, tangents)
    for before in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(OPS["linear: gelu"].ours, backend="eager", fullgraph=True)
        if before:
            compiled(*inputs)
        close(tangent(compiled, inputs, tangents), want)


def test_operators_by_name_refuse(device):
    (x, w, b), _ = drawn("linear: plain", device)
    with forward_ad.dual_level():
        assert torch.ops.primer_fast.linear(x, w, b, None, False)[0].shape == (4, 5)
        dual = forward_ad.make_dual(w, w)
        with pytest.raises(NotImplementedError, match="primer_fast::linear: tensors must have no tangent"):
            torch.ops.primer_fast.linear(x, dual, b, None, False)
        with pytest.raises(NotImplementedError, match="primer_fast::mlp: tensors must have no tangent"):
            torch.ops.primer_fast.mlp(x, [dual], [b], None, None, 1)
