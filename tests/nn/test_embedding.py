"""The embedding is torch's, with positions in the same pass."""

import inspect

import pytest
import torch

from primer_fast import nn


@pytest.mark.parametrize("arguments", [{}, {"padding_idx": 2}, {"padding_idx": -1}], ids=str)
def test_weights_repr_and_results_are_those_of_torch(arguments, device):
    torch.manual_seed(3)
    ours = nn.Embedding(7, 12, **arguments, device=device)
    torch.manual_seed(3)
    theirs = torch.nn.Embedding(7, 12, **arguments, device=device)
    assert torch.equal(ours.weight, theirs.weight) and repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert list(inspect.signature(nn.Embedding).parameters) == list(inspect.signature(torch.nn.Embedding).parameters)
    ids, dy = torch.randint(7, (2, 5), device=device), torch.randn(2, 5, 12, device=device)
    y, plain = ours(ids), theirs(ids)
    assert torch.equal(y, plain)
    y.backward(dy)
    plain.backward(dy)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)


def test_positions(device):
    layer, table = nn.Embedding(7, 12, device=device), torch.randn(6, 12, device=device)
    ids, places = torch.randint(7, (2, 5), device=device), torch.randint(6, (2, 5), device=device)
    assert torch.equal(layer(ids, table), layer.weight[ids] + table[:5])
    assert torch.equal(layer(ids, table, places), layer.weight[ids] + table[places])


def test_from_pretrained(device):
    weight = torch.randn(4, 3, device=device)
    layer = nn.Embedding.from_pretrained(weight)
    assert isinstance(layer, nn.Embedding) and not layer.weight.requires_grad
    assert torch.equal(layer(torch.tensor([2, 0], device=device)), weight[[2, 0]])


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}], ids=str)
def test_what_is_not_built_says_what_to_use(option):
    with pytest.raises(NotImplementedError, match=rf"Embedding: {next(iter(option))}=.*; use torch.nn.Embedding"):
        nn.Embedding(4, 3, **option)


def test_the_module_computes_by_our_function(monkeypatch, device):
    """Not by the forward that it inherits."""
    seen = []
    monkeypatch.setattr("primer_fast.functional.embedding", lambda *args, **options: seen.append((args, options)))
    layer, ids = nn.Embedding(4, 3, 1, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    layer(ids, layer.weight, ids)
    assert seen == [((ids, layer.weight, 1), {"position": layer.weight, "position_ids": ids})]
