"""replace_modules: what is left, with the reason and, where there is one, with another way to our ops."""

import copy

import pytest
import torch
import torch.nn.functional as torch_F
from adopt.foreign import MyActivation, OtherNames, Subclass
from parity import OneStatement, both, fused
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, prune

import primer_fast
import primer_fast.functional as F
from primer_fast import nn
from primer_fast.adopt.chain import activation_of, children_in_order
from primer_fast.adopt.recognise import known_activation, known_layer_norm

T = torch.nn


class Unnamed(MyActivation):
    """Its name says nothing of an activation."""


class ReadsShape(OtherNames):
    def forward(self, x):
        return torch.layer_norm(x, x.new_empty(0).shape[1:] or (8,), self.scale, self.shift, self.variance_epsilon)


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
