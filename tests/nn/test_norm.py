"""The layer norm is torch's, with the residual sum in the same pass."""

import inspect

import pytest
import torch

from primer_fast import nn

ARGUMENTS = [
    {"normalized_shape": 24},
    {"normalized_shape": (3, 8), "eps": 1e-3, "bias": False},
    {"normalized_shape": [24], "elementwise_affine": False},
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_parameters_repr_and_results_are_those_of_torch(arguments, device):
    ours, theirs = nn.LayerNorm(**arguments, device=device), torch.nn.LayerNorm(**arguments, device=device)
    assert repr(ours) == repr(theirs)
    assert inspect.signature(nn.LayerNorm) == inspect.signature(torch.nn.LayerNorm)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter)
    theirs.load_state_dict(ours.state_dict())
    x, r = (torch.randn(2, 5, *ours.normalized_shape, device=device) for _ in range(2))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours(x, r), theirs(x + r), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours(x, r, True), (theirs(x + r), x + r), rtol=1e-4, atol=1e-5)


def test_the_module_computes_by_our_function(monkeypatch, device):
    """Not by the forward that it inherits."""
    seen = []
    monkeypatch.setattr("primer_fast.functional.layer_norm", lambda *args, **options: seen.append((args, options)))
    layer, x = nn.LayerNorm(4, device=device), torch.randn(2, 4, device=device)
    layer(x, x, True)
    assert seen == [((x, (4,), layer.weight, layer.bias, 1e-5), {"residual": x, "return_residual": True})]
