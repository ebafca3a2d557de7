"""torch.func's transforms take PyTorch's operators, in a GPU's place too: what they give is what a loop gives."""

import pytest
import torch
from catalogue import SAMPLES, results
from torch.func import grad, vmap

from primer_fast.functional import logits

MANY = [s for s in SAMPLES if s.why != "dropout"]
shared = pytest.mark.parametrize("shared", [True, False], ids=["shared weights", "own weights"])


def drawn(sample, shared, device):
    """The arguments of three samples, stacked but for the weights that they share, and how vmap takes them."""
    sets = [sample.make(device, torch.float32, seed) for seed in range(3)]
    first = len(sample.whole) + (3 if "key" in sample.shapes else 1)
    own = [0 if i < first or not shared else None for i in range(len(sets[0]))]
    tensors = [torch.stack(t) if d == 0 else t[0] for t, d in zip(zip(*sets, strict=True), own, strict=True)]
    return [t.detach() for t in tensors], tuple(own)


def each(function, tensors, own):
    """The same by a loop over the samples."""
    rows = [function(*(t if d is None else t[i] for t, d in zip(tensors, own, strict=True))) for i in range(3)]
    return [torch.stack(t) for t in zip(*rows, strict=True)]


def equals_a_loop(sample, shared, device):
    def call(*tensors):
        return tuple(results(sample.call(*tensors)))

    tensors, own = drawn(sample, shared, device)
    got = vmap(call, own)(*tensors)
    torch.testing.assert_close(list(got), each(call, tensors, own), rtol=1e-5, atol=1e-5)


@shared
@pytest.mark.parametrize("sample", MANY, ids=str)
def test_vmap_equals_a_loop(sample, shared, device):
    equals_a_loop(sample, shared, device)


@pytest.mark.parametrize("sample", [s for s in MANY if "linear_weight" in s.shapes], ids=str)
def test_logits_that_would_be_made_in_chunks(sample, plain_path, monkeypatch):
    monkeypatch.setattr(logits, "PLAIN_BYTES", 0)
    equals_a_loop(sample, True, "cpu")


@shared
@pytest.mark.parametrize("sample", MANY, ids=str)
def test_gradients_per_sample_equal_those_of_autograd(sample, shared, device):
    """vmap of a gradient against the kernels' own gradient, one sample at a time."""
    count = len(sample.whole)

    def total(*tensors):
        outputs = [y for y in results(sample.call(*tensors)) if y.is_floating_point()]
        return sum((y * torch.linspace(0.5, 2, y.numel()).to(y).view(y.shape)).sum() for y in outputs)

    def by_autograd(*tensors):
        leaves = [t.clone().requires_grad_() for t in tensors[count:]]
        return torch.autograd.grad(total(*tensors[:count], *leaves), leaves)

    tensors, own = drawn(sample, shared, device)
    got = vmap(grad(total, tuple(range(count, len(tensors)))), own)(*tensors)
    torch.testing.assert_close(list(got), each(by_autograd, tensors, own), rtol=1e-4, atol=1e-4)
