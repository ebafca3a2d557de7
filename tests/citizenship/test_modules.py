"""Modules of primer_fast.nn in the hands of code that was written for torch.nn's."""

import copy
import pickle

import pytest
import torch
from torch.nn.utils import parametrizations, prune

from primer_fast import nn
from primer_fast.models.cnn import CNN, CNNConfig
from primer_fast.models.mlp import MLP, MLPConfig
from primer_fast.models.transformer import Transformer, TransformerConfig

MODULES = {  # ours, torch's, an input
    "Linear": (lambda n: n.Linear(6, 4), (3, 6)),
    "Linear without bias": (lambda n: n.Linear(6, 4, bias=False), (3, 6)),
    "Conv2d": (lambda n: n.Conv2d(2, 3, 3, padding=1), (1, 2, 5, 5)),
    "MaxPool2d": (lambda n: n.MaxPool2d(2), (1, 2, 4, 4)),
    "LayerNorm": (lambda n: n.LayerNorm(6), (3, 6)),
    "MultiheadAttention": (lambda n: n.MultiheadAttention(6, 2, batch_first=True), (2, 3, 6)),
    "Embedding": (lambda n: n.Embedding(5, 4, padding_idx=1), (2, 3)),
}
MODELS = {
    "MLP": lambda: MLP(MLPConfig((4, 5, 3))),
    "CNN": lambda: CNN(CNNConfig()),
    "Transformer": lambda: Transformer(TransformerConfig(vocab=11, context=8, width=8, layers=1, heads=2)),
}
modules = pytest.mark.parametrize("name", MODULES)
every = pytest.mark.parametrize("name", [*MODULES, *MODELS])


def make(name):
    torch.manual_seed(0)
    return MODULES[name][0](nn) if name in MODULES else MODELS[name]()


def twins(name):
    """Ours and torch's with the same weights."""
    ours, theirs = make(name), MODULES[name][0](torch.nn)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def example(name):
    generator = torch.Generator().manual_seed(1)
    if name == "Embedding":
        return torch.randint(0, 5, MODULES[name][1], generator=generator)
    return torch.randn(MODULES[name][1], generator=generator)


def call(module, x):
    if isinstance(module, torch.nn.MultiheadAttention):
        return module(x, x, x, need_weights=False)[0]
    return module(x)


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


@every
def test_deepcopy_and_pickle(name, plain_path):
    module = make(name)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        same_state(other, module)
        assert repr(other) == repr(module) and type(other) is type(module)
        own = {p.data_ptr() for p in module.parameters()}
        assert own.isdisjoint(p.data_ptr() for p in other.parameters())
        if name in MODULES:
            assert torch.equal(call(other, example(name)), call(module, example(name)))


@every
def test_save_and_load(name, tmp_path):
    module, other = make(name), make(name)
    for p in other.parameters():
        torch.nn.init.normal_(p)
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True), strict=True)
    same_state(other, module)
    with torch.device("meta"):
        empty = make(name)
    empty.load_state_dict(module.state_dict(), assign=True)
    same_state(empty, module)


@modules
def test_state_dicts_are_torchs_both_ways(name):
    ours, theirs = twins(name)
    for p in theirs.parameters():
        torch.nn.init.normal_(p)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    same_state(ours, theirs)
    missing = "Missing key.*" * bool(theirs.state_dict())
    with pytest.raises(RuntimeError, match=f"(?s){missing}Unexpected key"):
        ours.load_state_dict({"more": torch.ones(1)})


@modules
def test_hooks_see_what_they_see_on_torchs(name, place):
    ours, theirs = twins(name)
    results = []
    for module in (ours.to(place), theirs.to(place)):
        seen = []
        module.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))
        module.register_forward_hook(lambda m, args, out, seen=seen: seen.append(out[0] if type(out) is tuple else out))
        module.register_full_backward_pre_hook(lambda m, dy, seen=seen: seen.append(dy[0]))
        module.register_full_backward_hook(lambda m, dx, dy, seen=seen: seen.extend((dx[0], dy[0])))
        x = example(name).to(place)
        y = call(module, x.requires_grad_() if x.is_floating_point() else x)
        y.backward(torch.linspace(-1, 1, y.numel(), device=place).view(y.shape))
        results.append([*seen, *(p.grad for p in module.parameters())])
    got, want = results
    assert [t is None for t in got] == [t is None for t in want] and len(got) >= 5
    for g, w in zip(got, want, strict=True):
        if g is not None:
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


WEIGHTED = ["Linear", "Conv2d"]
REPARAMETERS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "pruned": lambda module: prune.l1_unstructured(module, "weight", amount=0.5),
}


@pytest.mark.parametrize("way", REPARAMETERS)
@pytest.mark.parametrize("name", WEIGHTED)
def test_reparametrised_weights(name, way, place):
    """The weight is computed anew at each call, and the gradient goes through to what it is computed from."""
    results = []
    for module in twins(name):
        torch.manual_seed(2)
        REPARAMETERS[way](module.to(place))
        y = call(module, example(name).to(place))
        y.backward(torch.linspace(-1, 1, y.numel(), device=place).view(y.shape))
        grads = dict(module.named_parameters())
        results.append({"y": y.detach()} | {key: p.grad for key, p in grads.items()})
    got, want = results
    assert list(got) == list(want) and all(g is not None for g in got.values())
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_to_another_dtype(name, dtype, plain_path):
    module = make(name).to(dtype)
    floats = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    assert {t.dtype for t in floats} <= {dtype}
    if name in MODULES:
        x = example(name)
        y = call(module, x.to(dtype) if x.is_floating_point() else x)
        assert y.dtype == dtype and y.isfinite().all()


@modules
def test_autocast(name, place):
    """Output, input's gradient and weights' gradients have the dtypes that they have on torch's."""
    results = []
    for module in twins(name):
        module, x = module.to(place), example(name).to(place)
        with torch.autocast(place, torch.bfloat16):
            y = call(module, x.requires_grad_() if x.is_floating_point() else x)
        y.backward(torch.ones_like(y))
        results.append([t if t is None else t.dtype for t in (y, x.grad, *(p.grad for p in module.parameters()))])
    assert results[0] == results[1] and len(results[0]) >= 2


@modules
def test_functional_call(name, place):
    module, x = make(name).to(place), example(name).to(place)
    weights = {key: torch.randn_like(p, requires_grad=True) for key, p in module.named_parameters()}
    args = (x, x, x) if name == "MultiheadAttention" else (x,)
    kwargs = {"need_weights": False} if name == "MultiheadAttention" else {}
    y = torch.func.functional_call(module, weights, args, kwargs)
    y = y[0] if isinstance(y, tuple) else y
    other = copy.deepcopy(module)
    other.load_state_dict({key: w.detach() for key, w in weights.items()})
    assert torch.equal(y, call(other, x))
    if weights:
        grads = torch.autograd.grad(y.square().sum(), list(weights.values()))
        assert all(g.any() for g in grads if g.numel() > 6) and all(p.grad is None for p in module.parameters())
