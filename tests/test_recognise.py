"""Classes of somebody's own that compute what LayerNorm or an activation of ours computes, and those that do not."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as torch_F
from parity import assert_as_before, both, fused

import primer_fast
import primer_fast.functional as F
from primer_fast import nn
from primer_fast.chain import activation_of
from primer_fast.recognise import known_activation, known_layer_norm

T = torch.nn


class LayerNorm(T.Module):
    """With a bias or without, as small models write it."""

    def __init__(self, width, bias=True):
        super().__init__()
        self.weight = T.Parameter(torch.ones(width))
        self.bias = T.Parameter(torch.zeros(width)) if bias else None

    def forward(self, hidden):
        return torch_F.layer_norm(hidden, self.weight.shape, self.weight, self.bias, 1e-3)


class OtherNames(T.Module):
    def __init__(self, width):
        super().__init__()
        self.scale, self.shift = T.Parameter(torch.ones(width)), T.Parameter(torch.zeros(width))
        self.variance_epsilon = 1e-3

    def forward(self, x):
        return torch.layer_norm(x, x.new_empty(0).shape[1:] or (8,), self.scale, self.shift, self.variance_epsilon)


class Named(OtherNames):
    def forward(self, x):
        return torch.layer_norm(x, (8,), self.scale, self.shift, self.variance_epsilon)


class Subclass(T.LayerNorm):
    fast = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fast:
            return x
        return torch_F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class OfPictures(T.LayerNorm):
    def forward(self, x):
        x = torch_F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class EitherOrder(T.LayerNorm):
    def __init__(self, width, order):
        super().__init__(width, eps=1e-3)
        self.order = order

    def forward(self, features):
        if self.order == "last":
            return super().forward(features)
        return super().forward(features.movedim(1, -1)).movedim(-1, 1)


NORMS = {
    "of its own": (lambda: LayerNorm(8), (3, 5, 8)),
    "without bias": (lambda: LayerNorm(8, bias=False), (3, 8)),
    "other names": (lambda: Named(8), (3, 5, 8)),
    "subclass": (lambda: Subclass(8, eps=1e-3), (3, 5, 8)),
    "several axes": (lambda: Subclass((5, 8)), (3, 5, 8)),
    "channels last": (lambda: EitherOrder(8, "last"), (2, 3, 4, 8)),
    "channels first": (lambda: EitherOrder(8, "first"), (2, 8, 3, 4)),
    "of pictures": (lambda: OfPictures(8), (2, 8, 3, 4)),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_norm_that_is_one_call_is_taken(name, dtype, device):
    make, shape = NORMS[name]
    module, before, report = both(make().to(device, dtype))
    (row,) = report.swapped
    assert (row.before, row.after) == (type(before).__name__, "primer_fast.functional.layer_norm") and not report.left
    assert isinstance(module, type(before)) and list(module.state_dict()) == list(before.state_dict())
    x = torch.randn(shape, device=device, dtype=dtype)
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        ours = F.layer_norm
        patch.setattr(F, "layer_norm", lambda *a, **k: calls.append(a) or ours(*a, **k))
        assert_as_before(module, before, lambda m: m(x.to(next(m.parameters()).dtype)))
    assert len(calls) == 1
    other = pickle.loads(pickle.dumps(copy.deepcopy(module)))
    assert type(other) is type(module) and torch.equal(other(x), module(x))
    report.restore()
    assert type(module) is type(before) and vars(module).keys() == vars(before).keys()


def test_what_is_called_in_another_way_goes_to_the_class_itself(plain_path):
    module, before, _ = both(T.ModuleList([LayerNorm(8), OfPictures(8), Subclass(8)]))
    x = torch.randn(2, 8)
    assert torch.equal(module[0](hidden=x), before[0](hidden=x))
    with pytest.raises(RuntimeError, match="permute"):
        module[1](x)
    for m in (module, before):
        m[2].eps = 0.5
    torch.testing.assert_close(module[2](x), before[2](x))
    compiled = torch.compile(module[0], fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), before[0](x))


class Manual(LayerNorm):
    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        return self.weight * centred / (x.std(-1, keepdim=True) + 1e-6) + self.bias


class Dropped(Subclass):
    def forward(self, x):
        return torch_F.dropout(super().forward(x), 0.1, self.training)


class OnlyTrained(Subclass):
    def forward(self, x):
        return super().forward(x) if self.training else x


class Narrowed(Subclass):
    def forward(self, x):
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return super().forward(x)


class Twice(Subclass):
    def forward(self, x):
        return super().forward(super().forward(x))


class OtherAxis(T.LayerNorm):
    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class NotReturned(Subclass):
    def forward(self, x):
        super().forward(x)
        return x


class OfHalf(Subclass):
    def forward(self, x):
        return torch_F.layer_norm(x, self.normalized_shape, self.weight.detach() * 0.5, self.bias, self.eps)


class Noted(Subclass):
    def __init__(self, width):
        super().__init__(width)
        self.seen = 0
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        return super().forward(x)


@pytest.mark.parametrize(
    "kind", [Manual, Dropped, OnlyTrained, Narrowed, Twice, OtherAxis, NotReturned, OfHalf, Noted, OtherNames]
)
def test_a_norm_that_is_more_or_other_is_left_with_a_reason(kind):
    module = kind(8)
    report = primer_fast.replace_modules(T.Sequential(module))
    assert type(module) is kind and not report.swapped and getattr(module, "seen", 0) == 0
    named = kind is not OtherNames and kind is not Manual
    assert [p.reason for p in report.left] == [
        "its forward is not just one call of layer_norm" if named else "no op of ours"
    ]
    report = primer_fast.replace_modules(T.Sequential(LayerNorm(8)), exclude=[LayerNorm])
    assert [p.reason for p in report.left] == ["not asked for"]


def test_a_class_named_layer_norm_that_is_none_is_not_called_unknown():
    LayerNorm2 = type("MyLayerNorm", (Manual,), {})
    assert primer_fast.replace_modules(LayerNorm2(8)).left[0].reason == "its forward is not just one call of layer_norm"


# Activations


class GELU(T.Module):
    def __init__(self, inplace=False):
        super().__init__()
        self.inplace = inplace

    def forward(self, input):
        return torch_F.gelu(input)


class NewGELU(T.Module):
    def forward(self, x):
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


class Swish(T.Module):
    def forward(self, x):
        return x.mul_(x.sigmoid())


class ByName(T.Module):
    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, x):
        return getattr(torch_F, self.name)(x)


class NamedActivation(ByName):
    pass


ACTIVATIONS = {
    "gelu": GELU(), "gelu_tanh": NewGELU(), "silu": Swish(), "relu": NamedActivation("relu"),
    "leaky_relu": NamedActivation("leaky_relu"), "sigmoid": NamedActivation("sigmoid"), "tanh": NamedActivation("tanh"),
}  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_of_its_own_is_fused(name, plain_path):
    kind = type(ACTIVATIONS[name])
    model = T.Sequential(T.Linear(6, 8), copy.deepcopy(ACTIVATIONS[name]), T.Linear(8, 6), T.Dropout(0.0), GELU())
    model, before, report = both(model)
    assert [(s.name, s.activation) for s in report.swapped] == [("0", name), ("2", None)]
    assert [(p.name, p.reason) for p in report.left] == [("3", "no op of ours"), ("4", "it follows Dropout")]
    assert isinstance(model[1], kind) and activation_of(model[1]) == name
    x = torch.randn(4, 6)
    assert fused(model, x) == [name, None]
    assert_as_before(model, before, lambda m: m(x.to(next(m.parameters()).dtype)))
    second = primer_fast.replace_modules(model)
    assert second.swapped == () and second.left == report.left
    again = pickle.loads(pickle.dumps(model))
    assert fused(again, x) == [name, None]
    if name == "gelu":
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), before(x))
    report.restore()
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert vars(model[1]).keys() == vars(before[1]).keys()


def _activation(function):
    return type("MyActivation", (T.Module,), {"forward": lambda self, x: function(x)})()


@pytest.mark.parametrize(
    "module",
    [
        _activation(lambda x: x * torch.sigmoid(1.702 * x)),
        _activation(lambda x: torch_F.gelu(x.clamp(max=1e4))),
        _activation(lambda x: torch_F.gelu(x).sum(-1)),
        _activation(lambda x: torch.softmax(x, -1)),
        _activation(lambda x: torch_F.relu(x).float()),
        _activation(lambda x: torch_F.rrelu(x, training=True)),
        _activation(lambda x: x if torch.rand(()) < 0.5 else torch_F.relu(x)),
        _activation(lambda x: x.relu() if x.dim() == 1 else x),
        _activation(lambda x: 1 / 0),
        NamedActivation("selu"),
    ],
)  # fmt: skip
def test_an_activation_that_is_none_of_ours_is_left(module):
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    assert known_activation(module) is None
    assert torch.equal(torch.random.get_rng_state(), state)
    report = primer_fast.replace_modules(T.Sequential(T.Linear(4, 4), module))
    assert report.left[0].reason.startswith("it computes none of relu, leaky_relu, gelu, ")


def test_nothing_runs_that_was_not_asked_for():
    ran = []
    module = _activation(lambda x: ran.append(1) or torch_F.relu(x))
    primer_fast.replace_modules(T.Sequential(T.Linear(2, 2), module), exclude=["1"])
    primer_fast.replace_modules(T.Sequential(T.Linear(2, 2), module), fuse_activations=False)
    assert not ran and known_activation(ByName("relu")) is None and known_layer_norm(T.Linear(2, 2)) is None


# What the report points to


class Attention(T.Module):
    def forward(self, q):
        return torch_F.scaled_dot_product_attention(q, q, q)


class ByHelper(T.Module):
    def forward(self, q):
        return self.attend(q)

    def attend(self, q):
        return helper(q)


def helper(q):
    return torch.nn.functional.scaled_dot_product_attention(q, q, q)


class Ours(T.Module):
    def forward(self, q):
        return F.scaled_dot_product_attention(q, q, q) + nn.functional.scaled_dot_product_attention(q, q, q)


def test_attention_that_is_called_as_a_function_points_to_sdpa():
    model = T.ModuleDict(
        {"a": Attention(), "b": ByHelper(), "c": Ours(), "d": T.MultiheadAttention(4, 2), "e": Attention()}
    )
    report = primer_fast.replace_modules(model)
    rows = [(p.name, p.kind) for p in report.left if "attention of" in p.kind]
    assert rows == [("a", "attention of Attention"), ("b", "attention of ByHelper"), ("e", "attention of Attention")]
    assert all("`with primer_fast.sdpa():`" in p.reason for p in report.left if "attention of" in p.kind)


def test_attention_that_was_imported_by_name_is_said_to_be_out_of_reach():
    names = {"scaled_dot_product_attention": torch_F.scaled_dot_product_attention, "__name__": "their_file"}
    exec("def forward(self, q):\n    return scaled_dot_product_attention(q, q, q)", names)
    report = primer_fast.replace_modules(type("Model", (T.Module,), {"forward": names["forward"]})())
    assert report.left[0].reason == (
        "their_file imports scaled_dot_product_attention by name, which primer_fast.sdpa() does not reach"
    )


def test_the_loss_head_is_suggested():
    class Model(T.Module):
        def __init__(self, *, bias, tied):
            super().__init__()
            self.table, self.out = T.Embedding(11, 6), T.Linear(6, 11, bias=bias)
            self.classes = T.Linear(6, 7)
            if tied:
                self.out.weight = self.table.weight

    for bias, argument in ((False, ""), (True, ", linear_bias=out.bias")):
        report = primer_fast.replace_modules(Model(bias=bias, tied=not bias))
        hint = f"primer_fast.functional.linear_cross_entropy(hidden, out.weight, target{argument})"
        assert report.hints == (f"{hint} makes the loss of out without its logits in memory",)
        assert str(report).splitlines()[-1] == f"hint: {report.hints[0]}"
    assert primer_fast.replace_modules(T.ModuleDict({"lm_head": T.Linear(4, 9)})).hints
    assert primer_fast.replace_modules(T.Sequential(T.Embedding(5, 4), T.Linear(4, 3), T.LazyLinear(2))).hints == ()
