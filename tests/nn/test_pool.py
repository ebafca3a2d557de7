"""The pooling module is torch's, computed here."""

import inspect

import pytest
import torch

from primer_fast import nn

ARGUMENTS = [
    {"kernel_size": 2},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)},
    {"kernel_size": 3, "stride": 2, "return_indices": True, "ceil_mode": True},
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_arguments_repr_and_results_are_those_of_torch(arguments, device):
    ours, theirs = nn.MaxPool2d(**arguments), torch.nn.MaxPool2d(**arguments)
    assert repr(ours) == repr(theirs)
    assert inspect.signature(nn.MaxPool2d) == inspect.signature(torch.nn.MaxPool2d)
    assert ours.state_dict() == theirs.state_dict() == {}
    x = torch.randn(2, 3, 9, 11, device=device)
    got, want = ours(x), theirs(x)
    pairs = zip(got, want, strict=True) if arguments.get("return_indices") else [(got, want)]
    assert all(torch.equal(g, w) for g, w in pairs)


def test_the_module_computes_by_our_function(monkeypatch, device):
    """Not by the forward that it inherits."""
    seen = []
    monkeypatch.setattr("primer_fast.functional.max_pool2d", lambda *args, **options: seen.append((args, options)))
    x = torch.randn(1, 1, 4, 4, device=device)
    nn.MaxPool2d(2, 1, 1, 1, True, True)(x)
    assert seen == [((x, 2, 1, 1, 1), {"return_indices": True, "ceil_mode": True})]
