"""replace_modules: what is taken computes as before and can be taken back; what is left is left with a reason.

Modules are torch's own, those of other authors' classes that compute the same, and models made of them.
"""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as torch_F
from parity import OneStatement, assert_as_before, both, fused
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, prune

import primer_fast
import primer_fast.functional as F
from primer_fast import nn
from primer_fast.adopt.chain import Chain, activation_of, children_in_order
from primer_fast.adopt.recognise import known_activation, known_layer_norm
from primer_fast.functional.activation import ACTIVATIONS

T = torch.nn

# Norms and activations of other authors' classes, and modules whose forward is a chain of calls


class OtherNames(T.Module):
    def __init__(self, width):
        super().__init__()
        self.scale, self.shift = T.Parameter(torch.ones(width)), T.Parameter(torch.zeros(width))
        self.variance_epsilon = 1e-3

    def forward(self, x):
        return torch.layer_norm(x, (8,), self.scale, self.shift, self.variance_epsilon)


class ReadsShape(OtherNames):
    def forward(self, x):
        return torch.layer_norm(x, x.new_empty(0).shape[1:] or (8,), self.scale, self.shift, self.variance_epsilon)


class Subclass(T.LayerNorm):
    fast = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fast:
            return x
        return torch_F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class OfPictures(T.LayerNorm):
    def forward(self, x):
        x = torch_F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, 1e-3)
        return x.permute(0, 3, 1, 2)


class EitherOrder(T.LayerNorm):
    def __init__(self, width, order):
        super().__init__(width, eps=1e-3)
        self.order = order

    def forward(self, features):
        if self.order == "last":
            return super().forward(features)
        return super().forward(features.movedim(1, -1)).movedim(-1, 1)


class MyActivation(T.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Unnamed(MyActivation):
    """Its name says nothing of an activation."""


def new_gelu(x):
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def swish(x):
    return x.mul_(x.sigmoid())


class Statements(OneStatement):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The same."""
        inner = self.act(self.fc1(hidden))  # a comment
        return self.fc2(inner)


class Sequence(T.Sequential):
    def extra_repr(self):
        return "of its own class"


# What is taken


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


# What is left


class MyLinear(T.Linear):
    pass


class Scaled(torch.Tensor):
    pass


def changed(module, **attributes):
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


class Manual(OtherNames):
    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        return self.scale * centred / (x.std(-1, keepdim=True) + 1e-6) + self.shift


class Noted(Subclass):
    def __init__(self, width):
        super().__init__(width)
        self.seen = 0
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        return super().forward(x)


norm = Subclass.forward
MORE_OR_OTHER = {  # forwards of norms
    "and dropout": lambda self, x: torch_F.dropout(norm(self, x), 0.1, self.training),
    "in training alone": lambda self, x: norm(self, x) if self.training else x,
    "of fewer bits": lambda self, x: norm(self, x.bfloat16() if torch.is_autocast_enabled(x.device.type) else x),
    "twice": lambda self, x: norm(self, norm(self, x)),
    "another axis": lambda self, x: T.LayerNorm.forward(self, x.transpose(1, 2)).transpose(1, 2),
    "not returned": lambda self, x: (norm(self, x), x)[1],
    "of half the weight": lambda self, x: torch_F.layer_norm(x, (8,), self.weight.detach() * 0.5, self.bias, self.eps),
}
NOT_JUST_ONE = "its forward is not just one call of layer_norm"
LEFT = {
    "subclass": (MyLinear(2, 2), "a subclass of Linear"),
    "parametrized": (parametrizations.weight_norm(T.Linear(2, 2)), "a subclass of Linear"),
    "lazy": (T.LazyLinear(2), "a subclass of Linear"),
    "max_norm": (T.Embedding(3, 2, max_norm=1.0), "max_norm is not built"),
    "scale_grad_by_freq": (T.Embedding(3, 2, scale_grad_by_freq=True), "scale_grad_by_freq is not built"),
    "sparse": (T.Embedding(3, 2, sparse=True), "sparse is not built"),
    "bias_k": (T.MultiheadAttention(4, 2, add_bias_kv=True), "add_bias_kv is not built"),
    "zero_attn": (T.MultiheadAttention(4, 2, add_zero_attn=True), "add_zero_attn is not built"),
    "forward": (changed(T.Linear(2, 2), forward=lambda x: x), "its forward is set on the instance"),
    "activation": (changed(T.Linear(2, 2), activation=T.ReLU()), "it has an attribute of its own named activation"),
    "another tensor": (
        changed(T.Linear(2, 2), weight=T.Parameter(torch.randn(2, 2).as_subclass(Scaled))),
        "its weight is a Scaled, no plain Parameter",
    ),
    "batch norm": (T.BatchNorm2d(2), "no op of ours"),
    "rms norm": (T.RMSNorm(2), "no op of ours"),
    "transposed convolution": (T.ConvTranspose2d(2, 2, 2), "no op of ours"),
    "script": (torch.jit.script(T.Sequential(T.Linear(2, 2), T.ReLU())), "compiled by TorchScript"),
    **{how: (type("Norm", (Subclass,), {"forward": f})(8), NOT_JUST_ONE) for how, f in MORE_OR_OTHER.items()},
    "a norm that counts its calls": (Noted(8), NOT_JUST_ONE),
    "a norm by hand": (Manual(8), "no op of ours"),
    "a norm by hand, named as one": (type("MyLayerNorm", (Manual,), {})(8), NOT_JUST_ONE),
    "a norm that reads the shape of its input": (ReadsShape(8), "no op of ours"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_and_why(name):
    module, reason = LEFT[name]
    kinds = [type(m) for m in module.modules()]
    report = primer_fast.replace_modules(T.ModuleDict({"inner": module}))
    assert [type(m) for m in module.modules()] == kinds and getattr(module, "seen", 0) == 0
    assert report.swapped == () and report.left[0].name == "inner" and report.left[0].reason == reason


NONE_OF_OURS = "it computes none of relu, leaky_relu, gelu, "
NO_ACTIVATION = [
    *((m, "no op of ours") for m in (T.LeakyReLU(0.2), T.ReLU6(), T.ELU(), T.Softplus(), T.PReLU(), T.Dropout())),
    *((MyActivation(function), NONE_OF_OURS) for function in (
        torch_F.selu,
        lambda x: x * torch.sigmoid(1.702 * x),
        lambda x: torch_F.gelu(x.clamp(max=1e4)),
        lambda x: torch_F.gelu(x).sum(-1),
        lambda x: torch.softmax(x, -1),
        lambda x: torch_F.relu(x).float(),
        lambda x: torch_F.rrelu(x, training=True),
        lambda x: x if torch.rand(()) < 0.5 else torch_F.relu(x),
        lambda x: x.relu() if x.dim() == 1 else x,
        lambda x: 1 / 0,
    )),
]  # fmt: skip


@pytest.mark.parametrize(("module", "reason"), NO_ACTIVATION)
def test_an_activation_that_is_none_of_ours_is_left(module, reason):
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    assert known_activation(module) is None and activation_of(module) is None
    assert torch.equal(torch.random.get_rng_state(), state)
    model = T.Sequential(T.Linear(4, 4), module)
    report = primer_fast.replace_modules(model)
    assert type(model) is T.Sequential and report.left[0].reason.startswith(reason)


def test_nothing_runs_that_was_not_asked_for():
    ran = []
    module = MyActivation(lambda x: ran.append(1) or torch_F.relu(x))
    primer_fast.replace_modules(T.Sequential(T.Linear(2, 2), module), exclude=["1"])
    primer_fast.replace_modules(T.Sequential(T.Linear(2, 2), module), fuse_activations=False)
    assert not ran and known_activation(Unnamed(torch_F.relu)) is None and known_layer_norm(T.Linear(2, 2)) is None


class Otherwise:
    """Forwards that are more than one call after another."""

    def residual(self, x):
        y = self.act(self.fc1(x))
        return x + self.fc2(y)

    def again(self, x):
        y = self.fc1(x)
        z = self.act(y)  # noqa: F841
        return self.fc2(y)

    def branch(self, x):
        x = self.fc1(x)
        if self.training:
            x = self.act(x)
        return self.fc2(x)

    def optional(self, x, again=None):
        return self.fc2(self.act(self.fc1(x)))

    @torch.no_grad()
    def decorated(self, x):
        return self.fc2(self.act(self.fc1(x)))


@pytest.mark.parametrize("how", ["residual", "again", "branch", "optional", "decorated"])
def test_any_other_forward_is_left(how, plain_path):
    kind = type("Other", (OneStatement,), {"forward": getattr(Otherwise, how)})
    model, before, report = both(kind())
    assert type(model) is kind and children_in_order(model) is None
    assert "forward is not known to call it" in {p.name: p.reason for p in report.left}["act"]
    x = torch.randn(3, 6)
    for mode in (True, False):
        torch.testing.assert_close(model.train(mode)(x), before.train(mode)(x))


def test_source_that_is_not_what_runs_proves_nothing(monkeypatch):
    monkeypatch.setattr(
        "inspect.getsource", lambda function: "def forward(self, x):\n    return self.act(self.fc1(x))\n"
    )

    class Other(OneStatement):
        def forward(self, x):
            return self.fc2(self.act(self.fc1(x)))

    assert children_in_order(Other()) is None
    monkeypatch.setattr("inspect.getsource", lambda function: (_ for _ in ()).throw(OSError))

    class Sourceless(OneStatement):
        def forward(self, x):
            return self.act(self.fc1(x))

    assert children_in_order(Sourceless()) is None


def test_wrapped_models_are_left(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        distributed, mesh = T.parallel.DistributedDataParallel, init_device_mesh("cpu", (1,))
        for wrapped in (distributed(T.Linear(2, 2)), fully_shard(T.Sequential(T.Linear(2, 2), T.ReLU()), mesh=mesh)):
            report = primer_fast.replace_modules(wrapped)
            assert report.left[0].reason == "call replace_modules before wrapping" and not report.swapped
        inner, before, report = both(T.Sequential(T.Linear(2, 2), T.ReLU()))
        x = torch.randn(3, 2)
        torch.testing.assert_close(distributed(inner)(x), before(x))
        sharded = fully_shard(inner, mesh=mesh)
        assert fused(sharded, x) == ["relu"]
        report.restore()
        assert type(sharded).__name__ == "FSDPSequential", "what was wrapped since stays"
        torch.testing.assert_close(sharded(x), before(x))
    finally:
        torch.distributed.destroy_process_group()


def test_hooks_that_make_a_weight_still_run(plain_path):
    plain = T.Sequential(T.Linear(4, 4), T.ReLU(), T.Linear(4, 4), T.ReLU())
    model, before = copy.deepcopy(plain), copy.deepcopy(plain)
    for m in (model, before):
        T.utils.weight_norm(m[0])
        prune.l1_unstructured(m[2], "weight", 0.5)
    report = primer_fast.replace_modules(model)
    assert [s.before for s in report.swapped] == ["Linear", "Linear"]
    assert {p.reason for p in report.left} == {"hooks keep it apart from Linear"}
    with torch.no_grad():
        for m in (model, before):
            m[0].weight_g.mul_(2)
    torch.testing.assert_close(model(torch.ones(3, 4)), before(torch.ones(3, 4)))


def test_include_and_exclude():
    def names(**options):
        model = T.ModuleDict(
            {"encoder": T.Sequential(T.Linear(2, 2), T.LayerNorm(2)), "head": T.Linear(2, 2), "norm": T.LayerNorm(2)}
        )
        report = primer_fast.replace_modules(model, **options)
        assert {type(m).__module__.split(".")[0] for m in model.modules()} == {"torch", "primer_fast"}
        assert all(p.reason == "not asked for" for p in report.left)
        return [s.name for s in report.swapped]

    assert names(include=["encoder"]) == ["encoder.0", "encoder.1"]
    assert names(include=[T.Linear]) == ["encoder.0", "head"]
    assert names(exclude=[T.LayerNorm, "h*"]) == ["encoder.0"]
    assert names(include="encoder.*", exclude=T.Linear) == ["encoder.1"]
    assert names(include=["encoder", "head"], exclude=["encoder.0"]) == ["encoder.1", "head"]


def test_fusing_is_an_option(plain_path):
    model = T.Sequential(T.Linear(2, 2), T.ReLU())
    report = primer_fast.replace_modules(model, fuse_activations=False)
    assert fused(model, torch.ones(1, 2)) == [None] and type(model) is T.Sequential
    assert [(p.name, p.reason) for p in report.left] == [("1", "not asked for")]
    model = T.Sequential(T.Linear(2, 2), T.ReLU())
    primer_fast.replace_modules(model, exclude=[T.ReLU])
    assert fused(model, torch.ones(1, 2)) == [None]


def test_wrong_arguments():
    model = T.Linear(2, 2)
    with pytest.raises(TypeError, match=r"replace_modules: model must be a torch.nn.Module; got list"):
        primer_fast.replace_modules([model])
    with pytest.raises(TypeError, match=r"exclude must hold types and strings; got 3"):
        primer_fast.replace_modules(model, exclude=[3])
    with pytest.raises(ValueError, match=r"include must hold patterns that match a module's name; got 'haed'"):
        primer_fast.replace_modules(model, include=["haed"])
    assert type(model) is T.Linear


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


# Models


def test_transformer_of_torch(plain_path):
    layer = T.TransformerEncoderLayer(12, 4, 20, dropout=0.0, batch_first=True)
    model, before, report = both(T.TransformerEncoder(layer, 2))
    reasons = {p.kind: p.reason for p in report.left}
    assert "set_fastpath_enabled" in reasons["TransformerEncoderLayer"]
    x, padding = torch.randn(2, 5, 12), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    assert_as_before(model, before, lambda m: m(x.to(m.layers[0].linear1.weight.dtype), src_key_padding_mask=padding))
    with torch.no_grad():  # torch's own path
        torch.testing.assert_close(*(m.eval()(x, src_key_padding_mask=padding) for m in (model, before)))
