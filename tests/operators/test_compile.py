"""Every op under torch.compile(fullgraph=True): the kernels inside the graph, and to the bit what eager gives."""

import importlib

import pytest
import torch
from functorch.compile import make_boxed_func
from operators.samples import SAMPLES, floats, indexed, results, run
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from primer_fast import functional as F
from primer_fast.functional import attention_operator, logits
from primer_fast.kernels.device import assume_chip
from primer_fast.kernels.prepared import unprepared


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()


class Graphs:
    """A backend that runs what AOTAutograd makes of a function, forward and backward, and remembers its operators."""

    def __init__(self):
        self.operators = set()
        self.backend = aot_autograd(fw_compiler=self.keep, bw_compiler=self.keep)

    def keep(self, graph, _):
        self.operators |= operators_of(graph)
        return make_boxed_func(graph.forward)


def operators_of(graph):
    called = (node.target for node in graph.graph.nodes if node.op == "call_function")
    return {target.name() for target in called if getattr(target, "namespace", "") == "primer_fast"}


def same(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_compiled_equals_eager(sample, device):
    """Results and gradients, their strides too, and both operators are in the graphs."""
    graphs = Graphs()
    compiled = torch.compile(sample.call, backend=graphs.backend, fullgraph=True)
    torch.manual_seed(0)
    want = run(sample.call, sample.make(device))
    torch.manual_seed(0)
    tensors = sample.make(device)
    same(run(compiled, tensors), want)
    assert f"primer_fast::{sample.op}" in graphs.operators
    backward = any(name.startswith(f"primer_fast::{sample.op}_backward") for name in graphs.operators)
    assert backward == any(t.requires_grad for t in tensors)


def _position_ids(i, w, p):
    return F.embedding(i, w, position=p, position_ids=i[:1])


GROWING = {  # a function, and its tensors for a batch of n and sizes that grow with it
    "linear": (
        lambda x, w, b: F.linear(x, w, b, activation="gelu"), lambda n: floats((n, n + 1, 3), (5, 3), (5,)),
    ),
    "mlp": (
        lambda x, v, w, b: F.mlp(x, (v, w), (b, None)), lambda n: floats((n, n + 1, 3), (5, 3), (2, 5), (5,)),
    ),
    "conv2d": (
        lambda x, w, b: F.conv2d(x, w, b, 2, 1, activation="relu"),
        lambda n: floats((n, 2, n + 2, 4), (3, 2, 3, 3), (3,)),
    ),
    "max_pool2d": (lambda x: F.max_pool2d(x, 3, 2, 1), lambda n: floats((n, 2, n + 2, 5))),
    "layer_norm": (
        lambda x, r, w, b: F.layer_norm(x, 8, w, b, residual=r, return_residual=True),
        lambda n: floats((n, n + 1, 8), (n, n + 1, 8), (8,), (8,)),
    ),
    "embedding": (_position_ids, lambda n: indexed(5, (n, n + 1), (7, 4), (5, 4))),
    "scaled_dot_product_attention": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, causal_offset=k.shape[2] - q.shape[2]),
        lambda n: floats((n, 1, n + 1, 8), (n, 1, n + 3, 8), (n, 1, n + 3, 8)),
    ),
    "linear_log_prob": (
        lambda t, x, w: F.linear_log_prob(x, w, t, return_entropy=True),
        lambda n: indexed(7, (n, 2), (n, 2, 4), (7, 4)),
    ),
    "linear_cross_entropy": (
        lambda t, x, w: F.linear_cross_entropy(x, w, t), lambda n: indexed(7, (n, n + 1), (n, n + 1, 4), (7, 4)),
    ),
    "linear_log_prob_kept": (
        lambda t, x, w: F.linear_log_prob(x, w, t, return_entropy=True, keep_logits=True),
        lambda n: indexed(7, (n, 2), (n, 2, 4), (n + 4, 4)),
    ),
    "linear_cross_entropy_kept": (
        lambda t, x, w: F.linear_cross_entropy(x, w, t, keep_logits=True),
        lambda n: indexed(7, (n, n + 1), (n, n + 1, 4), (n + 4, 4)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("op", GROWING)
@torch.fx.experimental._config.patch(use_duck_shape=False)  # sizes that happen to be equal would be taken for one
def test_one_graph_serves_every_size(op, device):
    call, make = GROWING[op]
    graphs = Graphs()
    compiled = torch.compile(call, backend=graphs.backend, fullgraph=True, dynamic=True)
    same(run(compiled, make(3)(device)), run(call, make(3)(device)))
    with torch.compiler.set_stance("fail_on_recompile"):
        for n in (4, 5):
            same(run(compiled, make(n)(device)), run(call, make(n)(device)))
    assert f"primer_fast::{op}" in graphs.operators


def test_a_batch_that_varies_recompiles_once(device):
    """As people call it: without dynamic=True the second size makes the batch dynamic, and that serves the rest."""
    call, make = GROWING["linear"]
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for n in (3, 4):
        run(compiled, make(n)(device))
    with torch.compiler.set_stance("fail_on_recompile"):
        same(run(compiled, make(7)(device)), run(call, make(7)(device)))


WRONG = {
    "linear": lambda x: F.linear(x, x[:, :2]),
    "mlp": lambda x: F.mlp(x, (x, x[:, :2])),
    "conv2d": lambda x: F.conv2d(x[None, None], x.expand(1, 2, 3, 4)),
    "max_pool2d": lambda x: F.max_pool2d(x[None], 9),
    "layer_norm": lambda x: F.layer_norm(x, 3),
    "embedding": lambda x: F.embedding(x, x),
    "scaled_dot_product_attention": lambda x: F.scaled_dot_product_attention(x, x[:, :2], x),
    "linear_log_prob": lambda x: F.linear_log_prob(x, x, x),
    "linear_cross_entropy": lambda x: F.linear_cross_entropy(x, x[:, :2], torch.zeros(3, dtype=torch.int64)),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("op", WRONG)
def test_errors_are_those_of_eager(op, dynamic, device):
    x = torch.randn(3, 4, device=device)
    with pytest.raises((ValueError, TypeError)) as eager:
        WRONG[op](x)
    assert str(eager.value).startswith(f"{op}: ")
    with pytest.raises(type(eager.value)) as compiled:
        torch.compile(WRONG[op], backend="eager", dynamic=dynamic)(x)
    assert str(compiled.value).startswith(str(eager.value).split(" got ")[0])


AUTOCAST = ("linear: bias, gelu", "mlp: gelu", "conv2d: gelu", "scaled_dot_product_attention: causal",
            "linear_log_prob: bias", "linear_cross_entropy: mean", "layer_norm: affine")  # fmt: skip


@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast_gives_the_dtypes_of_eager(name, device):
    (sample,) = (s for s in SAMPLES if str(s) == name)
    compiled = torch.compile(sample.call, backend="aot_eager", fullgraph=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        same(run(compiled, sample.make(device)), run(sample.call, sample.make(device)))


def test_the_fast_backward_is_taken_where_it_is_allowed(device, monkeypatch):
    calls, one_pass = [], attention_operator.attention_bwd_onepass
    monkeypatch.setattr(
        attention_operator, "attention_bwd_onepass", lambda *a, **o: calls.append(1) or one_pass(*a, **o)
    )
    torch.use_deterministic_algorithms(False)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def attend_fast(q, k, v):
        with F.fast_attention_backward():
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def times(call):
        calls.clear()
        with assume_chip("sm_90"):
            run(call, floats(*[(1, 1, 16, 16)] * 3, dtype=torch.bfloat16)(device))
        return len(calls)

    assert times(attend) == 0
    with F.fast_attention_backward():
        assert times(attend) == 1
    assert times(attend) == 0
    assert times(attend_fast) == 1
    assert times(attend) == 0


def test_the_precision_is_that_of_the_launch(device, monkeypatch):
    """An exported program, which has no guards, follows it too, as torch's own products do."""
    linear = importlib.import_module("primer_fast.functional.linear")
    seen, launcher = [], linear.linear_fwd
    monkeypatch.setattr(linear, "linear_fwd", lambda *a: seen.append(a[-1]) or launcher(*a))

    class Layer(torch.nn.Module):
        def forward(self, x):
            return F.linear(x, x)

    x = torch.randn(2, 3, device=device)
    compiled = torch.compile(Layer(), backend="aot_eager", fullgraph=True)
    exported = torch.export.export(Layer(), (x,)).module()
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high", "highest"):
            torch.set_float32_matmul_precision(precision)
            with unprepared():  # a prepared launcher does not call what this test put in its place
                compiled(x)
                exported(x)
            assert seen[-2:] == [precision] * 2
    finally:
        torch.set_float32_matmul_precision(before)


def test_logits_off_the_gpu_stay_out_of_memory_too(plain_path, monkeypatch):
    """The chunked path is an operator as well, not thousands of steps in the graph."""
    monkeypatch.setattr(logits, "PLAIN_BYTES", 0)
    for sample in (s for s in SAMPLES if s.op in ("linear_log_prob", "linear_cross_entropy")):
        graphs = Graphs()
        compiled = torch.compile(sample.call, backend=graphs.backend, fullgraph=True)
        same(run(compiled, sample.make("cpu")), run(sample.call, sample.make("cpu")))
        assert f"primer_fast::{sample.op}" in graphs.operators
        torch._dynamo.reset()


SOME = [s for s in SAMPLES if not any(word in s.why for word in ("gradient", "dropout", "kept"))][::3]


@pytest.mark.parametrize("sample", SOME, ids=str)
def test_fake_tensors_and_make_fx_see_the_operators(sample, device):
    tensors = [t.detach() for t in sample.make(device)]
    want = sample.call(*tensors)
    with FakeTensorMode() as mode:
        got = sample.call(*(mode.from_tensor(t) for t in tensors))
    for a, b in zip(*(y if isinstance(y, tuple) else (y,) for y in (got, want)), strict=True):
        assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)
    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(lambda *t: sample.call(*t), tracing_mode=mode)(*tensors)
        assert f"primer_fast::{sample.op}" in operators_of(graph)


class Named(torch.Tensor):
    """A subclass without any behaviour of its own."""


@pytest.mark.parametrize("sample", SOME[::2], ids=str)
def test_subclasses_give_what_tensors_give(sample, device):
    want = run(sample.call, sample.make(device))
    tensors = [t.detach().as_subclass(Named).requires_grad_(t.requires_grad) for t in sample.make(device)]
    got = run(sample.call, tensors)
    assert all(type(t) is Named for t in got[: len(want)])
    same([t.as_subclass(torch.Tensor) for t in got], want)


def test_vmap_inside_of_a_graph(device):
    x, w, t = torch.randn(3, 2, 4, device=device), torch.randn(5, 4, device=device), torch.tensor([1, 4], device=device)

    def each(x):
        return vmap(lambda x: F.linear_log_prob(F.linear(x, w[:4]), w, t))(x)

    compiled = torch.compile(each, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), each(x))


def test_gradients_of_an_operator_called_by_its_name(device):
    leaves = floats((4, 3), (5, 3), (5,))(device)

    def direct(*leaves):
        return torch.ops.primer_fast.linear(*leaves, "gelu", True)[0]

    same(run(direct, leaves), run(lambda *t: F.linear(*t, activation="gelu"), leaves))


def test_an_operator_that_kept_nothing_has_no_gradient(device):
    x, w = floats((4, 3), (5, 3))(device)
    with pytest.raises(ValueError, match="linear: keep must be True where an argument requires a gradient; got False"):
        torch.ops.primer_fast.linear(x, w, None, "gelu", False)


class NothingChanges(TorchDispatchMode):
    """Looks on, so that calls are operators."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", GROWING)
def test_second_derivatives_of_operators_are_those_of_eager(op, device):
    call, make = GROWING[op]

    def penalty(tensors):
        outputs, sources = results(call(*tensors)), [t for t in tensors if t.requires_grad]
        first = torch.autograd.grad(sum(y.square().sum() for y in outputs), sources, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), sources)

    want = penalty(make(3)(device))
    with NothingChanges():
        got = penalty(make(3)(device))
    torch.testing.assert_close(got, want)


def test_an_exported_program_has_second_derivatives(device):
    class Layer(torch.nn.Module):
        def forward(self, x, w):
            return F.linear(x, w, activation="gelu")

    leaves = floats((4, 3), (5, 3))(device)
    exported = torch.export.export(Layer(), tuple(leaves)).module()
    found = []
    for call in (exported, Layer()):
        (dx,) = torch.autograd.grad(call(*leaves).sum(), leaves[0], create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), leaves))
    torch.testing.assert_close(*found)
