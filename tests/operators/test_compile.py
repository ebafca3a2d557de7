"""Every op under torch.compile(fullgraph=True): the kernels inside the graph, and to the bit what eager gives."""

import importlib

import pytest
import torch
from catalogue import ATTENTION, GROWING, OPS, SAMPLES, Sample, results, run
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx

from primer_fast import functional as F
from primer_fast.functional import attention_operator, logits
from primer_fast.kernels.device import assume_chip
from primer_fast.kernels.launch.prepared import unprepared


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
    assert f"primer_fast::{sample.operator}" in graphs.operators
    backward = any(name.startswith(f"primer_fast::{sample.operator}_backward") for name in graphs.operators)
    assert backward == any(t.requires_grad for t in tensors)


@pytest.mark.parametrize("op", GROWING)
@torch.fx.experimental._config.patch(use_duck_shape=False)  # sizes that happen to be equal would be taken for one
def test_one_graph_serves_every_size(op, device):
    graphs, call = Graphs(), GROWING[op].call
    compiled = torch.compile(call, backend=graphs.backend, fullgraph=True, dynamic=True)
    first, *others = (GROWING[op].grown(n) for n in (1, 2, 3))
    same(run(compiled, first.make(device)), run(call, first.make(device)))
    with torch.compiler.set_stance("fail_on_recompile"):
        for sample in others:
            same(run(compiled, sample.make(device)), run(call, sample.make(device)))
    assert f"primer_fast::{op}" in graphs.operators


def test_a_batch_that_varies_recompiles_once(device):
    """As people call it: without dynamic=True the second size makes the batch dynamic, and that serves the rest."""
    sample = GROWING["linear"]
    compiled = torch.compile(sample.call, backend="aot_eager", fullgraph=True)
    for n in (1, 2):
        run(compiled, sample.grown(n).make(device))
    with torch.compiler.set_stance("fail_on_recompile"):
        same(run(compiled, sample.grown(5).make(device)), run(sample.call, sample.grown(5).make(device)))


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


@pytest.mark.parametrize("op", WRONG)
def test_errors_are_those_of_eager(op, device):
    """Where sizes are symbols."""
    x = torch.randn(3, 4, device=device)
    with pytest.raises((ValueError, TypeError)) as eager:
        WRONG[op](x)
    assert str(eager.value).startswith(f"{op}: ")
    with pytest.raises(type(eager.value)) as compiled:
        torch.compile(WRONG[op], backend="eager", dynamic=True)(x)
    assert str(compiled.value).startswith(str(eager.value).split(" got ")[0])


@pytest.mark.parametrize("name", OPS)
def test_autocast_gives_the_dtypes_of_eager(name, device):
    sample = OPS[name]
    compiled = torch.compile(sample.call, backend="aot_eager", fullgraph=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        same(run(compiled, sample.make(device)), run(sample.call, sample.make(device)))


HEADS = Sample(ATTENTION, "one head", dict.fromkeys(("query", "key", "value"), (1, 1, 16, 16)), dtype=torch.bfloat16)


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
            run(call, HEADS.make(device))
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
    for sample in (s for s in SAMPLES if "linear_weight" in s.shapes and s.operator == s.op):
        graphs = Graphs()
        compiled = torch.compile(sample.call, backend=graphs.backend, fullgraph=True)
        same(run(compiled, sample.make("cpu")), run(sample.call, sample.make("cpu")))
        assert f"primer_fast::{sample.operator}" in graphs.operators
        torch._dynamo.reset()


SOME = [s for s in SAMPLES if not any(word in s.why for word in ("gradient", "dropout", "kept"))][::3]


@pytest.mark.parametrize("sample", SOME, ids=str)
def test_fake_tensors_and_make_fx_see_the_operators(sample, device):
    tensors = [t.detach() for t in sample.make(device)]
    want = sample.call(*tensors)
    with FakeTensorMode() as mode:
        got = sample.call(*(mode.from_tensor(t) for t in tensors))
    for a, b in zip(results(got), results(want), strict=True):
        assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)
    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(lambda *t: sample.call(*t), tracing_mode=mode)(*tensors)
        assert f"primer_fast::{sample.operator}" in operators_of(graph)


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


def test_an_operator_that_kept_nothing_has_no_gradient(device):
    x, w, _ = OPS["linear: gelu"].make(device)
    with pytest.raises(ValueError, match="linear: keep must be True where an argument requires a gradient; got False"):
        torch.ops.primer_fast.linear(x, w, None, "gelu", False)


def test_an_exported_program_has_second_derivatives(device):
    class Layer(torch.nn.Module):
        def forward(self, x, w):
            return F.linear(x, w, activation="gelu")

    leaves = OPS["linear: plain"].make(device)[:2]
    exported = torch.export.export(Layer(), tuple(leaves)).module()
    found = []
    for call in (exported, Layer()):
        (dx,) = torch.autograd.grad(call(*leaves).sum(), leaves[0], create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), leaves))
    torch.testing.assert_close(*found)
