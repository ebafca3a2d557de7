"""replace_modules: what is taken computes as before, follows what is changed later, and can be taken back.

Modules are torch's own, those of other authors' classes that compute the same, and models made of them.
"""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as torch_F
from adopt.foreign import (
    EitherOrder,
    MyActivation,
    OfPictures,
    OtherNames,
    Sequence,
    Statements,
    Subclass,
    new_gelu,
    swish,
)
from parity import OneStatement, assert_as_before, both, fused

import primer_fast
import primer_fast.functional as F
from primer_fast import nn
from primer_fast.adopt.chain import Chain
from primer_fast.functional.activation import ACTIVATIONS

T = torch.nn


def ours(kind, activation=None, name=""):
    return [(name, f"primer_fast.nn.{kind}", activation)]


NORM = [("", "primer_fast.functional.layer_norm", None)]
CHAIN = [*ours("Linear", "silu", "fc1"), *ours("Linear", None, "fc2")]
IDS = torch.tensor([[1, 2, 10], [2, 0, 1]])
TAKEN = {  # what makes a module, the shape of its input, and the rows of the report: name, class of ours, activation
    "linear": (lambda: T.Linear(12, 20), (3, 5, 12), ours("Linear")),
    "linear without bias": (lambda: T.Linear(12, 20, bias=False), (3, 12), ours("Linear")),
    "convolution": (lambda: T.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 9, 9), ours("Conv2d")),
    "convolution of groups": (
        lambda: T.Conv2d(4, 6, (3, 2), padding="same", groups=2, bias=False), (2, 4, 7, 8), ours("Conv2d")
    ),
    "convolution, padding reflected": (
        lambda: T.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 7, 8), ours("Conv2d")
    ),
    "norm": (lambda: T.LayerNorm(12), (3, 5, 12), ours("LayerNorm")),
    "norm without bias": (lambda: T.LayerNorm((5, 12), eps=1e-3, bias=False), (3, 5, 12), ours("LayerNorm")),
    "norm without parameters": (lambda: T.LayerNorm(8, elementwise_affine=False), (3, 8), ours("LayerNorm")),
    "embedding": (lambda: T.Embedding(11, 6, padding_idx=2), IDS, ours("Embedding")),
    "pooling": (lambda: T.MaxPool2d(3, stride=2), (2, 3, 8, 8), ours("MaxPool2d")),
    "pooling with indices": (
        lambda: T.MaxPool2d(3, padding=1, return_indices=True, ceil_mode=True), (2, 3, 8, 8), ours("MaxPool2d")
    ),
    "attention": (lambda: T.MultiheadAttention(12, 3, batch_first=True), (2, 5, 12), ours("MultiheadAttention")),
    "attention, three widths": (
        lambda: T.MultiheadAttention(12, 3, kdim=12, vdim=12, bias=False), (2, 5, 12), ours("MultiheadAttention")
    ),
    "other names": (lambda: OtherNames(8), (3, 5, 8), NORM),
    "subclass": (lambda: Subclass(8, eps=1e-3), (3, 5, 8), NORM),
    "subclass without bias": (lambda: Subclass(8, bias=False), (3, 8), NORM),
    "several axes": (lambda: Subclass((5, 8)), (3, 5, 8), NORM),
    "channels last": (lambda: EitherOrder(8, "last"), (2, 3, 4, 8), NORM),
    "channels first": (lambda: EitherOrder(8, "first"), (2, 8, 3, 4), NORM),
    "of pictures": (lambda: OfPictures(8), (2, 8, 3, 4), NORM),
    "a chain in one statement": (OneStatement, (3, 6), CHAIN),
    "a chain in statements": (Statements, (3, 6), CHAIN),
    "a Sequential of its own class": (
        lambda: Sequence(*OneStatement().children()), (3, 6), [*ours("Linear", "silu", "0"), *ours("Linear", None, "2")]
    ),
}  # fmt: skip
IN_PLACE = {name: a.module() for name, a in ACTIVATIONS.items()}
OF_OTHERS = {
    "gelu": torch_F.gelu, "gelu_tanh": new_gelu, "silu": swish, "relu": torch_F.relu, "tanh": torch_F.tanh,
    "leaky_relu": torch_F.leaky_relu, "sigmoid": torch_F.sigmoid,
}  # fmt: skip
for _name, _module in IN_PLACE.items():
    if hasattr(_module, "inplace"):
        _module.inplace = True
    TAKEN[f"convolution and linear, {_name}"] = (
        lambda a=_module: T.Sequential(T.Conv2d(3, 4, 3), a, T.Flatten(), T.Linear(64, 5), a),
        (2, 3, 6, 6),
        [*ours("Conv2d", _name, "0"), *ours("Linear", _name, "3")],
    )
for _name, _function in OF_OTHERS.items():
    TAKEN[f"linear, {_name} of another class"] = (
        lambda f=_function: T.Sequential(
            T.Linear(6, 8), MyActivation(f), T.Linear(8, 6), T.Dropout(0.0), MyActivation(torch_F.gelu)
        ),
        (4, 6),
        [*ours("Linear", _name, "0"), *ours("Linear", None, "2")],
    )


def made(name, dtype=torch.float32, device="cpu"):
    """A module of the catalogue, replaced; as it was; the report; its input."""
    make, shape, _ = TAKEN[name]
    x = shape.to(device) if isinstance(shape, torch.Tensor) else torch.randn(shape, device=device, dtype=dtype)
    return *both(copy.deepcopy(make()).to(device, dtype)), x


def of(module, x, **options):
    """What a module makes of ``x``, in the dtype of its parameters."""
    for p in module.parameters():
        x = x.to(p.dtype) if x.is_floating_point() else x
    if isinstance(module, T.MultiheadAttention):
        return module(x, x, x, **options)[0]
    return module(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TAKEN)
def test_it_computes_what_it_did_on_the_kernels(name, dtype, device):
    module, before, report, x = made(name, dtype, device)
    assert [(s.name, s.after, s.activation) for s in report.swapped] == TAKEN[name][2]
    assert isinstance(module, type(before)) and list(module.state_dict()) == list(before.state_dict())
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        norm = F.layer_norm
        patch.setattr(F, "layer_norm", lambda *a, **k: calls.append(a) or norm(*a, **k))
        if list(module.parameters()):
            assert_as_before(module, before, lambda m: of(m, x))
        else:
            torch.testing.assert_close(of(module, x), of(before, x))
    assert TAKEN[name][2] != NORM or len(calls) == 1
    if name == "embedding":
        assert not module.weight.grad[2].any()


@pytest.mark.parametrize("name", TAKEN)
def test_it_can_be_copied_compiled_and_taken_back(name, plain_path):
    module, before, report, x = made(name)
    kinds, want = [type(m) for m in module.modules()], of(module, x)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)):
        assert [type(m) for m in other.modules()] == kinds
        torch.testing.assert_close(of(other, x), want, rtol=0, atol=0)
        assert not {id(p) for p in other.parameters()} & {id(p) for p in module.parameters()}
    if isinstance(module, T.Sequential | Chain):
        assert fused(other, x) == [activation for *_, kind, activation in TAKEN[name][2] if kind.endswith("Linear")]
        assert repr(module).splitlines()[0] == repr(before).splitlines()[0]
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: of(module, x), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), of(before, x))
    second = primer_fast.replace_modules(module)
    assert second.swapped == () and second.left == report.left
    second.restore()
    assert [type(m) for m in module.modules()] == kinds
    report.restore()
    assert [type(m) for m in module.modules()] == [type(m) for m in before.modules()]
    assert [vars(m).keys() for m in module.modules()] == [vars(m).keys() for m in before.modules()]
    torch.testing.assert_close(of(module, x), of(before, x), rtol=0, atol=0)
    assert primer_fast.replace_modules(module).swapped == report.swapped


def test_attention_without_weights(plain_path):
    module, before, report, x = made("attention")
    assert not report.left
    assert_as_before(module, before, lambda m: of(m, x, need_weights=False))


def test_what_is_called_in_another_way_goes_to_the_class_itself(plain_path):
    module, before, _ = both(T.ModuleList([OtherNames(8), OfPictures(8)]))
    x = torch.randn(2, 8)
    assert torch.equal(module[0](x=x), before[0](x=x))
    with pytest.raises(RuntimeError, match="permute"):
        module[1](x)
    for m in (module, before):
        m[0].variance_epsilon = 0.5
    torch.testing.assert_close(module[0](x), before[0](x))


def test_the_objects_stay(plain_path):
    shared = T.Linear(6, 6)
    model = T.Sequential(T.Embedding(9, 6), shared, T.Tanh(), shared, T.LayerNorm(6), T.Linear(6, 9, bias=False))
    model[5].weight = model[0].weight
    model[1].weight.requires_grad_(False)
    model[4].eval()
    calls = []
    model[4].register_forward_hook(lambda *_: calls.append("hook"))
    objects, names = list(model.modules()), list(model.state_dict())
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, before, report = both(model)
    assert [id(m) for m in model.modules()] == [id(m) for m in objects]
    assert list(model.state_dict()) == names
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.state_dict().values(), strict=True)
    )
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    assert not model[1].weight.requires_grad and not model[4].training and model[0].training
    assert [s.name for s in report.swapped] == ["0", "1", "4", "5"], "a module with two names is swapped once"
    ids = torch.randint(9, (4, 3))
    assert_as_before(model, before, lambda m: m(ids))
    assert calls
    head = model[0].weight.detach().clone()
    optimizer.step()
    assert model[5].weight is model[0].weight and not torch.equal(head, model[0].weight)
    assert type(model[5]) is nn.Linear and isinstance(model[5], T.Linear)


def test_transformer_of_torch(plain_path):
    layer = T.TransformerEncoderLayer(12, 4, 20, dropout=0.0, batch_first=True)
    model, before, report = both(T.TransformerEncoder(layer, 2))
    reasons = {p.kind: p.reason for p in report.left}
    assert "set_fastpath_enabled" in reasons["TransformerEncoderLayer"]
    x, padding = torch.randn(2, 5, 12), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    assert_as_before(model, before, lambda m: m(x.to(m.layers[0].linear1.weight.dtype), src_key_padding_mask=padding))
    with torch.no_grad():  # torch's own path
        torch.testing.assert_close(*(m.eval()(x, src_key_padding_mask=padding) for m in (model, before)))


# Fusing, and what happens later


def test_an_activation_with_a_forward_of_its_own_runs(plain_path):
    model, _, _, x = made("a Sequential of its own class")
    ran = []
    model[1].forward = lambda x: ran.append(1) or x
    model(x)
    assert ran


def test_what_happens_later_is_seen(plain_path):
    model, before, _ = both(T.Sequential(T.Linear(6, 6), T.ReLU(), T.Linear(6, 6), T.GELU()))
    x = torch.randn(4, 6)
    assert type(model[1]) is T.ReLU and fused(model, x) == ["relu", "gelu"]

    def same(names):
        torch.testing.assert_close(model(x), before(x))
        assert fused(model, x) == names

    def double(module, args, y):
        return y * 2

    def less(module, args):
        return args[0] - 1

    with model[0].register_forward_hook(double), before[0].register_forward_hook(double):
        same([None, "gelu"])
    with model[3].register_forward_pre_hook(less), before[3].register_forward_pre_hook(less):
        same(["relu", None])
    for m in (model, before):
        m[1] = T.ReLU6()
    same([None, "gelu"])
    torch.testing.assert_close(model[:3](x), before[:3](x))
    torch.testing.assert_close(model[2](x), before[2](x))
    torch.testing.assert_close(model[2:](x), before[2:](x))
    for m in (model, before):
        m.append(T.Tanh())
    same([None, "gelu"])
    with torch.nn.modules.module.register_module_forward_hook(double):
        same([None, None])
    torch.testing.assert_close(model(input=x), before(input=x))


def test_one_product_before_two_activations(plain_path):
    shared = T.Linear(4, 4)
    model = T.ModuleList([T.Sequential(shared, T.ReLU()), T.Sequential(shared, T.Tanh()), shared])
    model, before, _ = both(model)
    x = torch.randn(3, 4)
    torch.testing.assert_close(*([part(x) for part in parts] for parts in (model, before)))


def test_an_activation_in_two_places_is_reported_for_the_one_it_keeps():
    relu = T.ReLU()
    _, _, report = both(T.Sequential(T.Linear(2, 2), relu, T.BatchNorm1d(2), relu))
    assert [(p.name, p.kind) for p in report.left] == [("1", "ReLU"), ("2", "BatchNorm1d")]


def test_the_report_is_a_table():
    _, _, report = both(T.Sequential(T.Linear(2, 2), T.ReLU(), T.Linear(2, 2), T.ReLU(), T.BatchNorm1d(2)))
    assert str(report) == (
        "swapped 2\n"
        "     2  Linear + relu  primer_fast.nn.Linear  0, 1 more\n"
        "left 1\n"
        "     1  BatchNorm1d  no op of ours  4"
    )
