"""torch's scaled_dot_product_attention sent to ours: in a block, and through torch's registry of flash kernels."""

import math
import threading

import numpy as np
import pytest
import torch
from torch.nn import functional as torch_F
from torch.nn.functional import scaled_dot_product_attention as torchs
from torch.utils.checkpoint import checkpoint

import primer_fast
from primer_fast.adopt import flash_backend
from primer_fast.proof.numerics import budget, exact, worst


@pytest.fixture(autouse=True)
def torchs_own_afterwards():
    yield
    assert torch_F.scaled_dot_product_attention is torchs


def attend(*args, **options):
    return torch_F.scaled_dot_product_attention(*args, **options)


def with_gradients(y, inputs):
    """``y`` and the gradients of the inputs; every dtype holds the upstream gradient exactly."""
    dy = (torch.arange(y.numel(), device=y.device) % 7 - 3).view(y.shape) / 4
    return [y, *torch.autograd.grad(y, inputs, dy.to(y.dtype))]


def assert_right(got, inputs, **options):
    """As near to attention in float64 as torch's is."""
    plain = with_gradients(attend(*inputs, **options), inputs)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    if "attn_mask" in options and options["attn_mask"].is_floating_point():
        options["attn_mask"] = options["attn_mask"].double()
    want = with_gradients(attend(*wide, **options), wide)
    for name, *results in zip("yqkv", got, plain, want, strict=True):
        a, b, c = map(exact, results)
        assert worst(a, c) <= budget(inputs[0].dtype, worst(b, c), c, magnitude=float(np.abs(c).max())), name


def qkv(device="cpu", dtype=torch.float32, T=5, S=7, heads=(4, 4), D=8, requires_grad=True):
    shapes = [(2, heads[0], T, D), (2, heads[1], S, D), (2, heads[1], S, D)]
    return [torch.randn(s, device=device, dtype=dtype, requires_grad=requires_grad) for s in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True, "scale": 0.3},
        {"attn_mask": "bool"},
        {"attn_mask": "floating"},
        {"enable_gqa": True},
    ],
    ids=lambda options: " ".join(options),
)
def test_values_and_gradients_on_the_kernels(options, dtype, seen, device):
    inputs = qkv(device, dtype, heads=(4, 2) if "enable_gqa" in options else (4, 4))
    if kind := options.get("attn_mask"):
        mask = torch.rand(2, 1, 5, 7, device=device) < 0.7
        mask[..., 0] = True
        options = {"attn_mask": mask if kind == "bool" else torch.where(mask, 0.5, -1.0).to(dtype)}
    with primer_fast.sdpa():
        got = with_gradients(attend(*inputs, **options), inputs)
    assert len(seen) == 1
    assert_right(got, inputs, **options)
    assert len(seen) == 1, "not outside"


def test_callers_in_torch(seen, plain_path):
    x = torch.randn(2, 5, 8)
    module = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    want = module(x, x, x, need_weights=False)[0]
    with primer_fast.sdpa():
        got = module(x, x, x, need_weights=False)[0]
        torch_F.scaled_dot_product_attention(query=x, key=x, value=x, is_causal=False)
    assert len(seen) == 2
    torch.testing.assert_close(got, want)


def test_nested_decorating_and_left_by_an_error(seen, plain_path):
    q, k, v = qkv()
    routed = primer_fast.sdpa()
    with routed, primer_fast.sdpa(), routed:
        attend(q, k, v)
    assert len(seen) == 1

    @primer_fast.sdpa()
    def decorated(depth):
        attend(q, k, v)
        if depth:
            decorated(depth - 1)

    decorated(2)
    assert len(seen) == 4
    with pytest.raises(ZeroDivisionError), routed:
        attend(q, k, v)
        raise ZeroDivisionError
    attend(q, k, v)
    assert len(seen) == 5


def test_threads_that_overlap(seen, plain_path):
    q, k, v = qkv()
    barrier, counts = threading.Barrier(4), []

    def work(number):
        barrier.wait(10)
        for _ in range(200):
            with primer_fast.sdpa():
                counts.append(torch_F.scaled_dot_product_attention is not torchs)
        with primer_fast.sdpa():
            attend(q, k, v)
            barrier.wait(10)  # all are inside

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(counts) == 800 and all(counts) and len(seen) == 4


def test_somebody_elses_function_is_kept(seen, plain_path, monkeypatch):
    q, k, v = qkv()
    calls = []
    theirs = lambda *args, **options: calls.append(1) or torchs(*args, **options)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(torch_F, "scaled_dot_product_attention", theirs)
        with primer_fast.sdpa():
            attend(q, k, v)
            assert not calls
            attend(q, k, v, torch.zeros(5, 7, requires_grad=True))
        assert calls and torch_F.scaled_dot_product_attention is theirs
        with primer_fast.sdpa():
            other = torch_F.scaled_dot_product_attention = lambda *args, **options: theirs(*args, **options)
        assert torch_F.scaled_dot_product_attention is other


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_goes_to_torch(seen, plain_path):
    q, k, v = qkv()
    bias = torch.zeros(5, 7, requires_grad=True)
    packed = torch.nested.nested_tensor([torch.randn(n, 4, 8) for n in (3, 5)], layout=torch.jagged).transpose(1, 2)
    nested = torch.nested.nested_tensor([torch.randn(4, n, 8) for n in (3, 5)])

    class Named(torch.Tensor):
        pass

    with primer_fast.sdpa():
        assert torch.autograd.grad(attend(q, k, v, bias).sum(), bias)[0].shape == bias.shape
        assert attend(packed, packed, packed).is_nested and attend(nested, nested, nested).is_nested
        assert type(attend(q.as_subclass(Named), k, v)) is Named
        torch.testing.assert_close(torch.vmap(attend)(q, k, v), attend(q, k, v))
        assert len(seen) == 1
        torch.func.grad(lambda q: attend(q, k, v).sum())(q)
        attend(q, k, v, torch.ones(5, 7).bool(), is_causal=True)
        for wrong in ("none", torch.ones(5, 6)):
            with pytest.raises((RuntimeError, TypeError)) as theirs:
                torchs(q, k, v, wrong)
            with pytest.raises(type(theirs.value) if isinstance(wrong, str) else ValueError) as ours:
                attend(q, k, v, wrong)
            assert "scaled_dot_product_attention" in str(ours.value)
    assert len(seen) == 2, "and the mask that does not fit, which ours names"


def test_checkpoints_are_computed_again_the_same_way(seen):
    q, k, v = qkv(T=3, S=3)
    with primer_fast.sdpa():
        y = checkpoint(attend, q, k, v, use_reentrant=False)
        got = torch.autograd.grad(y.sum(), (q, k, v))
    assert len(seen) == 2
    torch.testing.assert_close(got, torch.autograd.grad(attend(q, k, v).sum(), (q, k, v)))


def test_other_dtypes(seen, plain_path):
    """float64, which no kernel takes, and what autocast makes of it."""
    q, k, v = qkv(dtype=torch.float64)
    with primer_fast.sdpa():
        got = attend(q, k, v)
        with torch.autocast("cpu", torch.bfloat16):
            assert attend(q.float(), k.float(), v.float()).dtype == torch.bfloat16
    assert torch.equal(got, attend(q, k, v)) and len(seen) == 2


def test_compiled_without_a_graph_break(seen, plain_path):
    q, k, v = qkv(S=5)

    def call(q, k, v):
        return attend(q, k, v, is_causal=True) * 2

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with primer_fast.sdpa():
        torch.testing.assert_close(compiled(q, k, v), call(q, k, v))
    traced = len(seen)
    assert traced == 2
    torch.testing.assert_close(compiled(q, k, v), call(q, k, v))
    assert len(seen) == traced, "outside of the block it is torch's again"

    @torch.compile(backend="aot_eager")
    def around(q, k, v):
        with primer_fast.sdpa():
            return call(q, k, v)

    torch.testing.assert_close(around(q, k, v), call(q, k, v))
    assert len(seen) == traced + 1, "a block in a compiled function breaks the graph and holds"


# torch's registry


flash = torch.ops.aten._scaled_dot_product_flash_attention


@pytest.fixture
def overridden():
    """For CPU tensors, where these operators have no kernel of torch's."""
    override = flash_backend.override("CPU")
    yield
    override.remove()
    with pytest.raises(NotImplementedError, match="Could not run"):
        flash(*qkv())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_flash_operator(dtype, causal, heads, overridden):
    T = 6
    inputs = qkv(dtype=dtype, T=T, S=T, heads=heads)
    y, lse, *rest = flash(*inputs, 0.0, causal, scale=0.4)
    assert_right(with_gradients(y, inputs), inputs, is_causal=causal, scale=0.4, enable_gqa=True)
    scores = inputs[0].double() @ inputs[1].double().repeat_interleave(4 // heads[1], 1).transpose(-2, -1) * 0.4
    scores = scores.masked_fill(~torch.ones(T, T).tril().bool(), -math.inf) if causal else scores
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
    assert rest[:4] == [None, None, T, T]


def test_flash_operator_returns_what_compiled_graphs_expect(overridden):
    for q in (
        torch.randn(2, 5, 4, 8).transpose(1, 2),
        torch.randn(2, 4, 5, 8),
        torch.randn(2, 5, 3, 4, 8)[:, :, 0].transpose(1, 2),
        torch.randn(4, 2, 5, 8).transpose(0, 1),
    ):
        got = flash(q, q, q)
        want = flash(*(t.to("meta") for t in (q, q, q)))
        strides = torch.empty_like(q).stride()
        assert got[0].stride() == strides
        for ours, theirs in zip(got, want, strict=True):
            assert type(ours) is type(theirs)
            if isinstance(ours, torch.Tensor):
                assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


def test_flash_operator_draws_the_same_dropout_again(overridden):
    q, k, v = qkv(T=6, S=6)
    v = torch.eye(6).expand(2, 4, 6, 6).clone().requires_grad_()  # the output is the weights
    q, k = (t.detach()[..., :6].requires_grad_() for t in (q, k))
    y = flash(q, k, v, 0.5)[0]
    dropped = y == 0
    assert 0.3 < dropped.float().mean() < 0.7
    dy = torch.randn_like(y)
    (dv,) = torch.autograd.grad(y, v, dy, retain_graph=True)
    torch.testing.assert_close(dv, y.transpose(-2, -1) @ dy)
    assert not torch.equal(dropped, flash(q, k, v, 0.5)[0] == 0)


def test_flash_operator_refuses_what_it_would_compute_otherwise(overridden):
    q, k, v = qkv(T=3, S=5)
    with pytest.raises(NotImplementedError, match="as many keys as queries; got 5 and 3"):
        flash(q, k, v, 0.0, True)
    with pytest.raises(NotImplementedError, match="set return_debug_mask=False"):
        flash(q, k, v, 0.0, False, True)


@pytest.mark.skipif(not hasattr(torch.nn.attention, "register_flash_attention_impl"), reason="none in this torch")
def test_registered_with_torch():
    primer_fast.register_attention()
    registry = torch.nn.attention
    assert "primer_fast" in registry.list_flash_attention_impls()
    assert registry.current_flash_attention_impl() is None, "the user activates it"
    registry.activate_flash_attention_impl("primer_fast")
    try:
        assert registry.current_flash_attention_impl() == "primer_fast"
    finally:
        registry.restore_flash_attention_impl()
    assert registry.current_flash_attention_impl() is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch chooses its flash kernels on a GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_activated_on_a_gpu(compiled, monkeypatch):
    calls, forward = [], flash_backend.attention_forward
    monkeypatch.setattr(flash_backend, "attention_forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    inputs = qkv("cuda", torch.bfloat16, T=128, S=128, D=64)
    primer_fast.register_attention()

    def call(q, k, v):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            return attend(q, k, v, is_causal=True)

    want = call(*inputs)
    dy = torch.randn_like(want)
    grads = torch.autograd.grad(want, inputs, dy)
    torch.nn.attention.activate_flash_attention_impl("primer_fast")
    try:
        got = (torch.compile(call) if compiled else call)(*inputs)
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(torch.autograd.grad(got, inputs, dy), grads, rtol=5e-2, atol=5e-2)
    finally:
        torch.nn.attention.restore_flash_attention_impl()
    assert len(calls) == 1
    call(*inputs)
    assert len(calls) == 1
