"""replace_modules on torch's own modules and models made of them."""

import copy
import io
import pickle

import pytest
import torch
from parity import OneStatement, assert_as_before, both, fused
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, prune

import primer_fast
from primer_fast import nn

T = torch.nn


MODULES = {
    "linear": (T.Linear(12, 20), (3, 5, 12)),
    "linear without bias": (T.Linear(12, 20, bias=False), (3, 12)),
    "convolution": (T.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 9, 9)),
    "convolution of groups": (T.Conv2d(4, 6, (3, 2), padding="same", groups=2, bias=False), (2, 4, 7, 8)),
    "convolution, padding reflected": (T.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 7, 8)),
    "norm": (T.LayerNorm(12), (3, 5, 12)),
    "norm without bias": (T.LayerNorm((5, 12), eps=1e-3, bias=False), (3, 5, 12)),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_module_computes_what_it_did_on_the_kernels(name, dtype, device):
    module, shape = copy.deepcopy(MODULES[name])
    module, before, report = both(module.to(device, dtype))
    assert type(module) is getattr(nn, type(before).__name__) and [s.name for s in report.swapped] == [""]
    x = torch.randn(shape, device=device, dtype=dtype)
    assert_as_before(module, before, lambda m: m(x.to(m.weight.dtype)))


def test_modules_without_floating_input_or_parameters(device):
    table, before, _ = both(T.Embedding(11, 6, padding_idx=2, device=device))
    ids = torch.tensor([[1, 2, 10], [2, 0, 1]], device=device)
    assert type(table) is nn.Embedding
    assert_as_before(table, before, lambda m: m(ids))
    assert not table.weight.grad[2].any()
    x = torch.randn(2, 3, 8, 8, device=device)
    for options in ({"stride": 2}, {"padding": 1, "return_indices": True, "ceil_mode": True}):
        pool, before, _ = both(T.MaxPool2d(3, **options))
        assert type(pool) is nn.MaxPool2d
        torch.testing.assert_close(pool(x), before(x), rtol=0, atol=0)
    norm, before, _ = both(T.LayerNorm(8, elementwise_affine=False))
    assert type(norm) is nn.LayerNorm
    torch.testing.assert_close(norm(x), before(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"kdim": 12, "vdim": 12, "bias": False}], ids=str)
def test_multihead_attention(options, device, plain_path):
    attention, before, report = both(T.MultiheadAttention(12, 3, batch_first=True, device=device, **options))
    assert type(attention) is nn.MultiheadAttention and not report.left
    x = torch.randn(2, 5, 12, device=device)
    for need_weights in (False, True):
        assert_as_before(
            attention, before, lambda m, w=need_weights: m(*[x.to(m.out_proj.weight.dtype)] * 3, need_weights=w)[0]
        )


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


class MyLinear(T.Linear):
    pass


def with_forward(module):
    module.forward = lambda x: x
    return module


LEFT = {
    "subclass": (MyLinear(2, 2), "a subclass of Linear"),
    "parametrized": (parametrizations.weight_norm(T.Linear(2, 2)), "a subclass of Linear"),
    "lazy": (T.LazyLinear(2), "a subclass of Linear"),
    "max_norm": (T.Embedding(3, 2, max_norm=1.0), "max_norm is not built"),
    "scale_grad_by_freq": (T.Embedding(3, 2, scale_grad_by_freq=True), "scale_grad_by_freq is not built"),
    "sparse": (T.Embedding(3, 2, sparse=True), "sparse is not built"),
    "bias_k": (T.MultiheadAttention(4, 2, add_bias_kv=True), "add_bias_kv is not built"),
    "zero_attn": (T.MultiheadAttention(4, 2, add_zero_attn=True), "add_zero_attn is not built"),
    "forward": (with_forward(T.Linear(2, 2)), "its forward is set on the instance"),
    "batch norm": (T.BatchNorm2d(2), "no op of ours"),
    "rms norm": (T.RMSNorm(2), "no op of ours"),
    "transposed convolution": (T.ConvTranspose2d(2, 2, 2), "no op of ours"),
    "script": (torch.jit.script(T.Sequential(T.Linear(2, 2), T.ReLU())), "compiled by TorchScript"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_and_why(name):
    module, reason = LEFT[name]
    kinds = [type(m) for m in module.modules()]
    report = primer_fast.replace_modules(T.ModuleDict({"inner": module}))
    assert [type(m) for m in module.modules()] == kinds
    assert report.swapped == () and report.left[0].name == "inner" and report.left[0].reason == reason


def test_tensors_of_other_classes_and_attributes_are_left():
    class Scaled(torch.Tensor):
        pass

    linear, named = T.Linear(2, 2), T.Linear(2, 2)
    linear.weight = T.Parameter(torch.randn(2, 2).as_subclass(Scaled))
    named.activation = T.ReLU()
    report = primer_fast.replace_modules(T.ModuleList([linear, named]))
    assert type(linear) is type(named) is T.Linear
    assert [p.reason for p in report.left][:2] == [
        "its weight is a Scaled, no plain Parameter", "it has an attribute of its own named activation",
    ]  # fmt: skip


def test_wrapped_models_are_left(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = T.parallel.DistributedDataParallel(T.Linear(2, 2))
        report = primer_fast.replace_modules(wrapped)
        assert report.left[0].reason == "call replace_modules before wrapping" and not report.swapped
        sharded = fully_shard(T.Sequential(T.Linear(2, 2), T.ReLU()), mesh=init_device_mesh("cpu", (1,)))
        report = primer_fast.replace_modules(sharded)
        assert report.left[0].reason == "call replace_modules before wrapping" and not report.swapped
        inner, before, report = both(T.Sequential(T.Linear(2, 2), T.ReLU()))
        x = torch.randn(3, 2)
        torch.testing.assert_close(T.parallel.DistributedDataParallel(inner)(x), before(x))
        sharded = fully_shard(inner, mesh=init_device_mesh("cpu", (1,)))
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


def test_a_second_call_changes_nothing_and_restore_everything(plain_path):
    model, before, first = both(T.Sequential(OneStatement(), T.Linear(6, 6), T.Tanh(), T.Dropout(0.0), T.ReLU()))
    classes = [type(m) for m in model.modules()]
    second = primer_fast.replace_modules(model)
    assert second.swapped == () and second.left == first.left and [type(m) for m in model.modules()] == classes
    second.restore()
    assert [type(m) for m in model.modules()] == classes
    first.restore()
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert [vars(m).keys() for m in model.modules()] == [vars(m).keys() for m in before.modules()]
    x = torch.randn(2, 6)
    assert torch.equal(model(x), before(x))
    assert len(primer_fast.replace_modules(model).swapped) == len(first.swapped)


def test_copies_and_pickles(plain_path):
    model, _, _ = both(T.Sequential(OneStatement(), T.Linear(6, 6), T.Tanh()))
    x, file = torch.randn(2, 6), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        assert torch.equal(other(x), model(x)) and fused(other, x) == ["silu", None, "tanh"]
        assert other[1].weight is not model[1].weight


def test_compiled_without_a_graph_break(plain_path):
    model, before, _ = both(T.Sequential(OneStatement(), T.Linear(6, 6), T.Tanh(), T.LayerNorm(6)))
    x = torch.randn(3, 6)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), before(x))


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


def test_transformer_of_torch(plain_path):
    layer = T.TransformerEncoderLayer(12, 4, 20, dropout=0.0, batch_first=True)
    model, before, report = both(T.TransformerEncoder(layer, 2))
    reasons = {p.kind: p.reason for p in report.left}
    assert "set_fastpath_enabled" in reasons["TransformerEncoderLayer"]
    x, padding = torch.randn(2, 5, 12), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    assert_as_before(model, before, lambda m: m(x.to(m.layers[0].linear1.weight.dtype), src_key_padding_mask=padding))
    with torch.no_grad():  # torch's own path
        torch.testing.assert_close(*(m.eval()(x, src_key_padding_mask=padding) for m in (model, before)))


def convolution(inputs, outputs, size, stride=1):
    return T.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class Block(T.Module):
    """A residual block as torchvision writes it: two convolutions, or three with a bottleneck."""

    def __init__(self, inputs, width, outputs, stride, bottleneck):
        super().__init__()
        sizes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
        sizes = sizes if bottleneck else [(inputs, width, 3, stride), (width, outputs, 3, 1)]
        self.convolutions = T.ModuleList(convolution(*size) for size in sizes)
        self.norms = T.ModuleList(T.BatchNorm2d(size[1]) for size in sizes)
        self.relu = T.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = T.Sequential(convolution(inputs, outputs, 1, stride), T.BatchNorm2d(outputs))

    def forward(self, x):
        out = x
        for i, (conv, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            out = norm(conv(out))
            if i < len(self.norms) - 1:
                out = self.relu(out)
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


def resnet(bottleneck):
    stem = [convolution(3, 8, 7, 2), T.BatchNorm2d(8), T.ReLU(inplace=True), T.MaxPool2d(3, 2, 1)]
    blocks = [Block(8, 8, 16, 1, bottleneck), Block(16, 8, 16, 2, bottleneck)]
    return T.Sequential(*stem, *blocks, T.AdaptiveAvgPool2d(1), T.Flatten(), T.Linear(16, 10))


@pytest.mark.parametrize("bottleneck", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resnet(bottleneck, dtype, plain_path):
    assert_resnet_as_before(resnet(bottleneck).to(dtype), torch.randn(2, 3, 32, 32, dtype=dtype))


def test_resnet_on_the_kernels(device):
    x = torch.randn(1, 3, 16, 16, device=device).to(memory_format=torch.channels_last)
    assert_resnet_as_before(resnet(False).to(device, memory_format=torch.channels_last), x)


def assert_resnet_as_before(model, x):
    model, before, report = both(model)
    kinds = [s.before for s in report.swapped]
    assert kinds.count("Conv2d") == sum(isinstance(m, T.Conv2d) for m in before.modules())
    assert "MaxPool2d" in kinds and "Linear" in kinds
    reasons = {(p.kind, p.reason) for p in report.left}
    assert ("ReLU", "it follows BatchNorm2d") in reasons and ("BatchNorm2d", "no op of ours") in reasons
    assert_as_before(model, before, lambda m: m(x.to(m[0].weight.dtype)))
