"""torch.func's transforms take PyTorch's operators, in a GPU's place too: what they give is what a loop gives."""

import pytest
import torch
from torch.func import grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from primer_fast import functional as F
from primer_fast.functional import logits


def floats(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


IDS = torch.arange(12).view(3, 2, 2) % 5
CALLS = {  # a function of one sample, the samples (3, ...) of its first arguments, and what all samples share
    "linear": (lambda x, w, b: F.linear(x, w, b, activation="gelu"), [(3, 2, 4)], [(5, 4), (5,)]),
    "linear, relu": (lambda x, w, b: F.linear(x, w, b, activation="relu"), [(3, 2, 4), (3, 5, 4)], [(5,)]),
    "mlp": (lambda x, v, w, b: F.mlp(x, (v, w), (b, None)), [(3, 2, 4), (3, 5, 4)], [(6, 5), (5,)]),
    "conv2d": (lambda x, w, b: F.conv2d(x, w, b, 1, 1, activation="tanh"), [(3, 2, 5, 4)], [(4, 2, 3, 3), (4,)]),
    "conv2d, own kernels": (lambda x, w: F.conv2d(x, w), [(3, 2, 2, 5, 4), (3, 4, 2, 3, 3)], []),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2), [(3, 2, 4, 6)], []),
    "layer_norm": (
        lambda x, r, w, b: F.layer_norm(x, 4, w, b, residual=r), [(3, 2, 4), (3, 2, 4)], [(4,), (4,)]
    ),
    "embedding": (lambda i, w, p: F.embedding(i, w, 1, position=p), [IDS], [(5, 4), (2, 4)]),
    "scaled_dot_product_attention": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), [(3, 1, 2, 4, 8)] * 3, []
    ),
    "scaled_dot_product_attention, options": (
        lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, window=2, softcap=3.0, key_lengths=torch.tensor([3]), causal_offset=1, enable_gqa=True
        ),
        [(3, 1, 2, 4, 8), (3, 1, 1, 4, 8), (3, 1, 1, 4, 8)], [],
    ),
    "linear_log_prob": (lambda i, x, w: F.linear_log_prob(x, w, i - 1, ignore_index=-1), [IDS, (3, 2, 2, 4)], [(5, 4)]),
    "entropy": (
        lambda i, x, w: F.linear_log_prob(x, w, i, temperature=0.5, return_entropy=True, ignore_index=2)[1],
        [IDS, (3, 2, 2, 4)], [(5, 4)],
    ),
    "linear_cross_entropy": (
        lambda i, x, w, b: F.linear_cross_entropy(x, w, i, linear_bias=b, ignore_index=2, label_smoothing=0.1),
        [IDS, (3, 2, 2, 4)], [(5, 4), (5,)],
    ),
}  # fmt: skip


def arrange(name):
    """The function, its arguments and how vmap takes them."""
    function, own, shared = CALLS[name]
    whole = [t for t in own if isinstance(t, torch.Tensor)]
    arguments = [*whole, *floats(*(s for s in (*own, *shared) if not isinstance(s, torch.Tensor)))]
    return function, arguments, (0,) * len(own) + (None,) * len(shared)


def each(function, arguments, in_dims):
    """The same by a loop over the samples."""
    rows = [function(*(t if d is None else t[i] for t, d in zip(arguments, in_dims, strict=True))) for i in range(3)]
    return tuple(map(torch.stack, zip(*rows, strict=True))) if isinstance(rows[0], tuple) else torch.stack(rows)


def gradients(function, arguments):
    """Of a sum that weighs every element, by the floating-point arguments."""
    places = tuple(i for i, t in enumerate(arguments) if t.is_floating_point())

    def total(*tensors):
        y = function(*tensors)
        return (y * torch.arange(1.0, y.numel() + 1).view(y.shape)).sum()

    return grad(total, places)


@pytest.mark.parametrize("name", CALLS)
def test_vmap_equals_a_loop(name, device):
    function, arguments, in_dims = arrange(name)
    got = vmap(function, in_dims)(*arguments)
    torch.testing.assert_close(got, each(function, arguments, in_dims), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["linear_log_prob", "linear_cross_entropy"])
def test_logits_that_would_be_made_in_chunks(name, plain_path, monkeypatch):
    monkeypatch.setattr(logits, "PLAIN_BYTES", 0)
    function, arguments, in_dims = arrange(name)
    got = vmap(function, in_dims)(*arguments)
    torch.testing.assert_close(got, each(function, arguments, in_dims), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CALLS)
def test_gradients_per_sample_equal_those_of_autograd(name, device):
    """vmap(grad(f)) against the kernels' own gradient, one sample at a time."""
    function, arguments, in_dims = arrange(name)
    of_sample = gradients(function, arguments)

    def by_autograd(*tensors):
        leaves = [t.clone().requires_grad_() if t.is_floating_point() else t for t in tensors]
        y = function(*leaves)
        weight = torch.arange(1.0, y.numel() + 1).view(y.shape)
        return torch.autograd.grad(y, [t for t in leaves if t.requires_grad], weight)

    got = vmap(of_sample, in_dims)(*arguments)
    torch.testing.assert_close(got, each(by_autograd, arguments, in_dims), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in CALLS if name != "embedding"])
def test_jvp_equals_a_difference(name, device):
    function, arguments, in_dims = arrange(name)
    arguments = [t if d is None else t[0] for t, d in zip(arguments, in_dims, strict=True)]
    floating = [t.double() for t in arguments if t.is_floating_point()]
    whole = [t for t in arguments if not t.is_floating_point()]
    along = [torch.cos(torch.arange(t.numel(), dtype=t.dtype)).view(t.shape) for t in floating]
    h = 1e-6
    ahead, behind = (function(*whole, *(t + s * v for t, v in zip(floating, along, strict=True))) for s in (h, -h))
    with sdpa_kernel(SDPBackend.MATH):  # torch's other attention kernels have no forward derivative
        y, dy = jvp(lambda *t: function(*whole, *t), tuple(floating), tuple(along))
    torch.testing.assert_close(dy, (ahead - behind) / (2 * h), rtol=1e-5, atol=1e-5)
    assert y.shape == dy.shape
