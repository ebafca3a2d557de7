"""Layers called in turn: one function where all are plain, one by one where a call of one does anything else."""

import pytest
import torch

from primer_fast import functional as F
from primer_fast import nn
from primer_fast.models.mlp import MLP, MLPConfig
from primer_fast.models.transformer import Transformer, TransformerConfig
from primer_fast.nn import layers as in_layers
from primer_fast.nn.layers import in_turn


@pytest.fixture
def whole(monkeypatch):
    """Widths of the layers of each call of F.mlp."""
    seen, mlp = [], F.mlp

    def watched(x, weights, biases, **options):
        seen.append([w.shape[0] for w in weights])
        return mlp(x, weights, biases, **options)

    monkeypatch.setattr(in_layers.F, "mlp", watched)
    return seen


def made(*activations, device="cpu"):
    torch.manual_seed(0)
    return [nn.Linear(4, 4, bias=i != 1, device=device, activation=a) for i, a in enumerate(activations)]


@pytest.mark.parametrize(
    "activations", [("gelu", None), ("relu", "relu", "tanh"), (None, None), ("silu",), (None,)], ids=str
)
def test_plain_layers_are_one_function(activations, whole, device):
    layers = made(*activations, device=device)
    x = torch.randn(3, 4, device=device)
    want = x
    for layer in layers:
        want = layer(want)
    torch.testing.assert_close(in_turn(layers, x), want, rtol=0, atol=0)
    assert whole == [[4] * len(activations)]


def hooked(layer):
    layer.register_forward_hook(lambda module, args, y: 2 * y)


def hooked_before(layer):
    layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def own_forward(layer):
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)


def own_class(layer):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer.__class__ = Doubled


def normed(layer):
    torch.nn.utils.parametrizations.weight_norm(layer)
    with torch.no_grad():
        layer.parametrizations.weight.original0 *= 2


@pytest.mark.parametrize("change", [hooked, hooked_before, own_forward, own_class, normed])
@pytest.mark.parametrize("which", [0, 1])
def test_layers_that_do_more_are_called(change, which, whole, plain_path):
    layers = made("gelu", None)
    plain = in_turn(layers, torch.ones(3, 4))
    assert whole.pop() == [4, 4]
    change(layers[which])
    got = in_turn(layers, torch.ones(3, 4))
    want = layers[1](layers[0](torch.ones(3, 4)))
    assert not whole and torch.equal(got, want) and not torch.allclose(got, plain)


def test_backward_hooks_and_hooks_of_all_modules_are_called(whole, plain_path):
    layers, seen = made("gelu", None), []
    with layers[0].register_full_backward_hook(lambda module, before, after: seen.append(1)):
        in_turn(layers, torch.ones(3, 4, requires_grad=True)).sum().backward()
    with torch.nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(2)):
        in_turn(layers, torch.ones(3, 4))
    assert seen == [1, 2, 2] and not whole


def test_activations_that_differ_are_one_by_one(whole, plain_path):
    layers = made("gelu", "relu", None)
    in_turn(layers, torch.ones(3, 4))
    assert not whole


def transformer():
    return Transformer(TransformerConfig(vocab=11, context=8, width=8, layers=2, heads=2))


@pytest.mark.parametrize(
    "model, batch, widths, watched",
    [
        (lambda: MLP(MLPConfig((4, 5, 3, 2))), torch.ones(3, 4), [[5, 3, 2]], lambda m: m.layers[1]),
        (transformer, torch.ones(1, 3, dtype=torch.int64), [[32, 8]] * 2, lambda m: m.blocks[0].up),
    ],
    ids=["mlp", "transformer"],
)
def test_models_run_their_layers_in_one_until_one_has_a_hook(model, batch, widths, watched, whole, plain_path):
    model, seen = model().eval(), []
    want = model(batch)
    assert whole == widths
    watched(model).register_forward_hook(lambda module, args, y: seen.append(y))
    got = model(batch)
    assert torch.equal(got, want) and len(seen) == 1 and len(whole) == 2 * len(widths) - 1


def test_the_plain_path_saves_no_more_than_layers_one_by_one(plain_path):
    model = MLP(MLPConfig((4, 5, 3, 2), "gelu"))

    def saved(call):
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
            call(torch.ones(6, 4))
        return shapes

    def one_by_one(x):
        for layer in model.layers:
            x = layer(x)

    assert saved(model) == saved(one_by_one)
