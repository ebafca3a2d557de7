"""Each module is torch's of that name, computed by our function: weights, signature, repr, results, gradients."""

import inspect

import pytest
import torch
from catalogue import run

from primer_fast import nn

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")

MODULES = [  # name, arguments, shape of an input; integers are below 7
    ("Linear", (24, 40), {}, (3, 5, 24)),
    ("Linear", (24, 40), {"bias": False, "dtype": torch.bfloat16}, (7, 24)),
    ("Conv2d", (3, 4, (3, 2), 2, (1, 0)), {}, (2, 3, 7, 6)),
    *(
        ("Conv2d", (2, 3, (4, 3)), {"padding": padding, "padding_mode": mode}, (2, 2, 6, 5))
        for mode in ("reflect", "replicate", "circular")
        for padding in (1, "same")
    ),
    ("LayerNorm", (24,), {}, (2, 5, 24)),
    ("LayerNorm", ((3, 8),), {"eps": 1e-3, "bias": False}, (2, 5, 3, 8)),
    ("LayerNorm", ([24],), {"elementwise_affine": False}, (2, 5, 24)),
    ("MaxPool2d", (2,), {}, (2, 3, 9, 11)),
    ("MaxPool2d", ((3, 2), (2, 1), (1, 0), (1, 2)), {}, (2, 3, 9, 11)),
    ("MaxPool2d", (3,), {"stride": 2, "return_indices": True, "ceil_mode": True}, (2, 3, 9, 11)),
    ("Embedding", (7, 12), {}, (2, 5)),
    ("Embedding", (7, 12), {"padding_idx": 2}, (2, 5)),
    ("Embedding", (7, 12), {"padding_idx": -1}, (2, 5)),
]


def pair(name, *arguments, **options):
    """Ours and torch's, made from one seed."""
    made = []
    for modules in (nn, torch.nn):
        torch.manual_seed(3)
        made.append(getattr(modules, name)(*arguments, **options))
    return made


@pytest.mark.parametrize("name, arguments, options, shape", MODULES, ids=str)
def test_is_torchs(name, arguments, options, shape, device):
    ours, theirs = (module.to(device) for module in pair(name, *arguments, **options))
    assert isinstance(ours, getattr(torch.nn, name))
    assert repr(ours).replace(", activation=None", "") == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q) and p.dtype == q.dtype
        torch.nn.init.normal_(p)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randint(7, shape, device=device) if name == "Embedding" else torch.randn(shape, device=device)
    x = x.to(options.get("dtype", x.dtype))
    got, want = (run(lambda x, *_, m=module: m(x), [x, *module.parameters()]) for module in (ours, theirs))
    tolerance = 2e-2 if x.dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["LayerNorm", "MaxPool2d", "Embedding"])
def test_the_signature_is_torchs(name):
    assert inspect.signature(getattr(nn, name)).parameters.keys() == (
        inspect.signature(getattr(torch.nn, name)).parameters.keys()
    )


@pytest.mark.parametrize(
    "name, arguments, shape, function",
    [
        ("Linear", (24, 40), (3, 24), torch.nn.functional.gelu),
        ("Conv2d", (3, 4, (3, 2), 2, (1, 0)), (2, 3, 7, 6), torch.relu),
    ],
)
def test_an_activation(name, arguments, shape, function, device):
    ours = getattr(nn, name)(*arguments, activation=function.__name__, device=device)
    theirs = getattr(torch.nn, name)(*arguments, device=device)
    theirs.load_state_dict(ours.state_dict())
    assert repr(ours) == f"{repr(theirs)[:-1]}, activation={function.__name__})"
    x = torch.randn(shape, device=device)
    torch.testing.assert_close(ours(x), function(theirs(x)), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=rf"{name}: activation must be None or one of relu, .*; got 'swish'"):
        getattr(nn, name)(*arguments, activation="swish")


T = torch.ones(1, 1, 4, 4)
IDS = torch.zeros(2, dtype=torch.int64)
CALLS = {  # a module, what it is called with, and what of that its function gets besides the first
    "layer_norm": (nn.LayerNorm(4), (T, T, True), {"residual": T, "return_residual": True}),
    "max_pool2d": (nn.MaxPool2d(2, 1, 1, 1, True, True), (T,), {"return_indices": True, "ceil_mode": True}),
    "embedding": (nn.Embedding(4, 3, 1), (IDS, T, IDS), {"position": T, "position_ids": IDS}),
}


@pytest.mark.parametrize("op", CALLS)
def test_the_module_computes_by_our_function(op, monkeypatch):
    """Not by the forward that it inherits."""
    seen = []
    monkeypatch.setattr(f"primer_fast.functional.{op}", lambda *args, **options: seen.append((args[0], options)))
    module, arguments, options = CALLS[op]
    module(*arguments)
    assert len(seen) == 1 and seen[0][0] is arguments[0] and seen[0][1].keys() == options.keys()
    assert all(seen[0][1][name] is value for name, value in options.items())


def test_a_norm_of_a_residual_sum(device):
    ours, theirs = (module.to(device) for module in pair("LayerNorm", 24))
    x, r = torch.randn(2, 2, 5, 24, device=device)
    torch.testing.assert_close(ours(x, r), theirs(x + r), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours(x, r, True), (theirs(x + r), x + r), rtol=1e-4, atol=1e-5)


def test_positions_of_an_embedding(device):
    layer, table = nn.Embedding(7, 12, device=device), torch.randn(6, 12, device=device)
    ids, places = torch.randint(7, (2, 5), device=device), torch.randint(6, (2, 5), device=device)
    assert torch.equal(layer(ids, table), layer.weight[ids] + table[:5])
    assert torch.equal(layer(ids, table, places), layer.weight[ids] + table[places])


def test_an_embedding_from_pretrained(device):
    weight = torch.randn(4, 3, device=device)
    layer = nn.Embedding.from_pretrained(weight)
    assert isinstance(layer, nn.Embedding) and not layer.weight.requires_grad
    assert torch.equal(layer(torch.tensor([2, 0], device=device)), weight[[2, 0]])
