"""What could be traced, scripted and read by torch.fx can be after replace_modules, and our ops can in user's code."""

import io
import warnings

import pytest
import torch
from catalogue import OPS
from torch.nn import functional as torch_F

from primer_fast import functional as F
from primer_fast import nn, replace_modules
from primer_fast.functional.activation import ACTIVATIONS


class Images(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.features = torch.nn.Sequential(
            torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2), torch.nn.Dropout(0.1),
            torch.nn.Conv2d(4, 4, 3, padding="same", padding_mode="circular"), torch.nn.GELU("tanh"),
        )  # fmt: skip
        self.norm = torch.nn.LayerNorm(4)

    def forward(self, x):
        return self.norm(self.features(x).mean((2, 3)))


class Feed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = torch.nn.Linear(8, 6), torch.nn.SiLU(), torch.nn.Linear(6, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.up(x)))


class Words(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(11, 8, padding_idx=0)
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        self.first = torch.nn.MultiheadAttention(8, 2, kdim=8, vdim=8, bias=False)
        self.norm, self.feed, self.head = torch.nn.LayerNorm(8), Feed(), torch.nn.Linear(8, 11, bias=False)

    def forward(self, ids):
        x = self.table(ids)
        x = x + self.attention(x, x, x, key_padding_mask=ids == 0)[0]
        x = x + self.first(x, x, x, need_weights=False)[0]
        return self.head(x + self.feed(self.norm(x)))


def images(count):
    return torch.linspace(-1, 1, count * 64).sin().view(count, 1, 8, 8)


def words(count):
    return torch.arange(count * 5).view(count, 5) % 11


def rows(count):
    return torch.linspace(-2, 2, count * 8).view(count, 8)


def saved(compiled):
    """As it comes back from a file."""
    file = io.BytesIO()
    torch.jit.save(compiled, file)
    file.seek(0)
    return torch.jit.load(file)


def export(model, x):
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    return torch.export.export(model, (x,), dynamic_shapes=(batch,)).module()


WAYS = {
    "trace": lambda model, x: saved(torch.jit.trace(model, x)),
    "script": lambda model, x: saved(torch.jit.script(model)),
    "fx": lambda model, x: torch.fx.symbolic_trace(model),
    "export": export,
}
MODELS = {"images": (Images, images), "words": (Words, words), "a fused chain": (Feed, rows)}
quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@quiet
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_replaced_models(name, way, device):
    """On another batch size than it was traced with; the graph holds torch's operators, which are right on any path."""
    make, draw = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    want = model(draw(3)).detach()
    assert replace_modules(model).swapped
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        compiled = WAYS[way](model, draw(2))
    torch.testing.assert_close(compiled(draw(3)), want, rtol=1e-4, atol=1e-5)


@quiet
def test_a_scripted_model_trains(device):
    torch.manual_seed(0)
    model = Words().eval()
    want = torch.autograd.grad(model(words(2)).square().sum(), list(model.parameters()))
    replace_modules(model)
    scripted = torch.jit.script(model)
    got = torch.autograd.grad(scripted(words(2)).square().sum(), list(scripted.parameters()))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@quiet
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_scripted_activations(activation, plain_path):
    x = torch.linspace(-3, 3, 30).view(5, 6)
    layer, conv = nn.Linear(6, 4, activation=activation), nn.Conv2d(1, 2, 3, activation=activation)
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))
    torch.testing.assert_close(torch.jit.script(conv)(x[None]), conv(x[None]))


@quiet
def test_scripted_options(plain_path):
    x, residual = rows(3).unbind(-1)[0].expand(2, 3), torch.ones(2, 3)
    norm = nn.LayerNorm(3)
    scripted = torch.jit.script(norm)
    torch.testing.assert_close(scripted(x, residual), norm(x, residual))
    with pytest.raises(torch.jit.Error, match="LayerNorm: return_residual must be False in TorchScript"):
        scripted(x, residual, True)
    table, ids, position = nn.Embedding(11, 8), words(2), torch.randn(6, 8)
    scripted = torch.jit.script(table)
    for place in (None, torch.tensor([3, 3, 0, 1, 2])):
        torch.testing.assert_close(scripted(ids, position, place), table(ids, position, place))
    pool = nn.MaxPool2d(2, return_indices=True)
    torch.testing.assert_close(torch.jit.script(pool)(images(1)), pool(images(1)))


@quiet
@pytest.mark.parametrize("name", OPS)
def test_every_op_is_traced(name, device):
    op = OPS[name]
    inputs = [x.detach() for x in op.floats(torch.float32, device)]
    for _ in range(2):
        op.ours(*inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(op.ours, tuple(inputs))
    assert {node.kind().split("::")[0] for node in traced.graph.nodes()} <= {"aten", "prim"}
    assert not any(node.kind() == "prim::PythonOp" for node in traced.graph.nodes())
    others = [x.detach() for x in op.floats(torch.float32, device, seed=1)]
    torch.testing.assert_close(traced(*others), op.torchs(*others), rtol=1e-4, atol=1e-5)


@quiet
def test_a_traced_embedding_knows_no_length(device):
    table, position = torch.randn(11, 8, device=device), torch.randn(5, 8, device=device)
    traced = torch.jit.trace(lambda ids: F.embedding(ids, table, position=position), words(2).to(device))
    torch.testing.assert_close(traced(words(2)[:, :3].to(device)), (table[words(2)] + position)[:, :3])


def test_functions_are_nodes_of_fx(device):
    """And modules too, whose hooks run when the graph does."""

    class Mixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.weight = nn.Linear(8, 8), torch.nn.Parameter(torch.randn(4, 8))

        def forward(self, x, classes):
            x = F.layer_norm(self.layer(x), 8, residual=x)
            x = F.mlp(x, [self.weight, self.weight.t()], activation="relu")
            return F.linear_cross_entropy(F.linear(x, self.layer.weight, activation="tanh"), self.weight, classes)

    model, x, classes = Mixed().to(device), rows(3).to(device), torch.tensor([0, 3, 1], device=device)
    graph = torch.fx.symbolic_trace(model)
    called = [node.target for node in graph.graph.nodes if node.op in ("call_function", "call_module")]
    assert called == ["layer", F.layer_norm, F.mlp, F.linear, F.linear_cross_entropy]
    torch.testing.assert_close(graph(x, classes), model(x, classes))
    seen = []
    graph.layer.register_forward_hook(lambda *_: seen.append(1))
    graph(x, classes)
    assert seen == [1]


def test_a_layer_alone_in_fx(plain_path):
    layer = nn.Linear(8, 4, activation="silu")
    graph = torch.fx.symbolic_trace(layer)
    torch.testing.assert_close(graph(rows(2)), torch_F.silu(torch_F.linear(rows(2), layer.weight, layer.bias)))


def test_a_chain_keeps_the_names_of_its_arguments(device):
    model = Feed()
    replace_modules(model)
    assert type(model).forward is not Feed.forward
    torch.testing.assert_close(model(x=rows(2)), Feed.forward(model, rows(2)))
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (rows(2),), dynamic_shapes={"x": {0: batch}})
    torch.testing.assert_close(exported.module()(rows(3)), model(rows(3)), rtol=1e-4, atol=1e-5)
