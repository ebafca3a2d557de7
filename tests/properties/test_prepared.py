"""Prepared launchers give what they give unprepared, bit for bit, whatever sequence of calls came before."""

import random

import pytest
import torch

from primer_fast import functional as F
from primer_fast.kernels import prepared, tunable
from primer_fast.kernels.device import assume_chip, forget_chip

SEQUENCE = 24  # calls, of so few kinds that most come often enough to run by a plan
FLOATS = (torch.float32, torch.bfloat16)


def placed(rng, shape, dtype):
    """A tensor of new numbers: contiguous, with an axis of its own order, behind a gap, or off its 16 bytes."""
    how = rng.choice(("contiguous", "contiguous", "permuted", "sliced", "offset"))
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(rng.randrange(2**31))).to(dtype)
    if how == "permuted":
        return numbers.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "sliced":
        return torch.zeros(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2].copy_(numbers)
    if how == "offset":
        return torch.zeros(numbers.numel() + 3, dtype=dtype)[3:].view(shape).copy_(numbers)
    return numbers


def linear(rng, new):
    rows = rng.choice(((3,), (2, 3)))
    activation, bias = rng.choice((None, "gelu", "relu")), rng.choice((True, False))
    tensors = new((*rows, 8)), new((5, 8)), new((5,)) if bias else None
    return tensors, lambda x, w, b: F.linear(x, w, b, activation=activation)


def mlp(rng, new):
    layers = rng.choice((1, 2))
    tensors = new((3, 8)), *(new((8, 8)) for _ in range(layers)), *(new((8,)) for _ in range(layers))
    return tensors, lambda x, *rest: F.mlp(x, rest[:layers], rest[layers:])


def conv2d(rng, new):
    stride, activation = rng.choice((1, (2, 1), [1, 1])), rng.choice((None, "silu"))
    tensors = new((2, 3, 5, 4)), new((4, 3, 3, 3)), new((4,))
    return tensors, lambda x, w, b: F.conv2d(x, w, b, stride, 1, activation=activation)


def max_pool2d(rng, new):
    stride = rng.choice((None, 1, (2, 1)))
    return (new((2, 3, 5, 4)),), lambda x: F.max_pool2d(x, 2, stride)


def layer_norm(rng, new):
    shape, residual, table = rng.choice(((6,), (4, 6))), rng.choice((True, False)), rng.choice((True, False))
    tensors = new((3, 4, 6)), new((3, 4, 6)) if residual else None, new(shape) if table else None
    return tensors, lambda x, r, w: F.layer_norm(x, shape, w, residual=r)


def embedding(rng, new):
    ids = torch.tensor([[rng.randrange(7) for _ in range(4)] for _ in range(2)])
    padding, position = rng.choice((None, 3, -4)), rng.choice((True, False))
    tensors = new((7, 6)), new((5, 6)) if position else None
    return tensors, lambda w, p: F.embedding(ids, w, padding, position=p)


def scaled_dot_product_attention(rng, new):
    heads, keys, width = rng.choice((2, 4)), rng.choice((3, 5)), rng.choice((8, 16))
    options = rng.choice(({"is_causal": True}, {"window": 2}, {"scale": 0.3}, {"dropout_p": 0.5}))
    masked = rng.choice((None, None, (2, heads, 3, keys), (3, keys), (2, 1, 1, keys)))
    mask = None if masked is None else torch.ones(masked, dtype=torch.bool).tril(1)
    tensors = new((2, heads, 3, width)), new((2, 2, keys, width)), new((2, 2, keys, width))
    return tensors, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True, **options)


def linear_cross_entropy(rng, new):
    target = torch.tensor([rng.choice((-100, 0, 3, 8)) for _ in range(4)])
    options = {"reduction": rng.choice(("mean", "sum", "none")), "label_smoothing": rng.choice((0.0, 0.1))}
    options["keep_logits"] = rng.choice((True, False))
    tensors = new((4, 6)), new((9, 6)), rng.choice((new((9,)), None))
    return tensors, lambda x, w, b: F.linear_cross_entropy(x, w, target, linear_bias=b, **options)


def linear_log_prob(rng, new):
    target = torch.tensor([[rng.randrange(9) for _ in range(2)] for _ in range(2)])
    temperature = rng.choice((1.0, 0.7))
    return (new((2, 2, 6)), new((9, 6))), lambda x, w: F.linear_log_prob(x, w, target, temperature=temperature)


OPS = (
    linear, mlp, conv2d, max_pool2d, layer_norm, embedding, scaled_dot_product_attention, linear_cross_entropy,
    linear_log_prob,
)  # fmt: skip


def run(draw, seed, device):
    """A sequence of calls: their results and gradients."""
    rng, found = random.Random(seed), []
    torch.manual_seed(seed)
    for _ in range(SEQUENCE):
        numbers, kind = random.Random(rng.random()), random.Random(f"{seed} {rng.randrange(4)}")
        dtype = kind.choice(FLOATS)

        def new(shape, kind=kind, dtype=dtype, numbers=numbers):
            return placed(_Mixed(kind, numbers), shape, dtype).to(device)

        tensors, call = draw(kind, new)
        wanted = rng.random() < 0.7
        leaves = [t.requires_grad_(wanted) for t in tensors if t is not None]
        y = call(*tensors)
        found.append(y.detach().clone())
        if wanted:
            found += torch.autograd.grad(y, leaves, torch.ones_like(y))
    return found


class _Mixed:
    """Choices from one generator, numbers from another: calls of one kind have different numbers."""

    def __init__(self, kind, numbers):
        self.choice, self.randrange = kind.choice, numbers.randrange


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("draw", OPS, ids=lambda draw: draw.__name__)
def test_sequences_of_calls(draw, seed, device):
    got = run(draw, seed, device)
    assert sum(len(function.plans) for function in prepared._functions) > 1
    with prepared.unprepared():
        prepared.forget()
        want = run(draw, seed, device)
    assert len(got) == len(want) >= SEQUENCE
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def plans():
    return sum(len(function.plans) for function in prepared._functions)


def calls(device, times=3):
    x, w = torch.ones(3, 8, device=device), torch.ones(5, 8, device=device)
    for _ in range(times):
        F.linear(x, w)


def test_the_second_call_of_a_kind_makes_its_plan(device):
    for times in (1, 2, 3):
        calls(device, 1)
        assert plans() == (times > 1)


@pytest.mark.parametrize("change", [forget_chip, tunable.forget_tuned, prepared.forget])
def test_what_settings_rest_on_takes_the_plans_along(change, device):
    calls(device)
    assert plans() == 1
    change()
    assert plans() == 0


def test_an_assumed_chip_has_plans_of_its_own(device):
    calls(device)
    with assume_chip("sm_80"):
        assert plans() == 0
        calls(device)
        assert plans() == 1
    assert plans() == 0


def test_whoever_watches_settings_is_asked_at_every_call(device):
    asked = []
    with tunable.watching(lambda choice, gpu, problem: asked.append(choice.name) or choice.chosen(gpu, problem)):
        calls(device, 4)
    assert asked.count("matmul") == 4 and plans() == 0


def test_numbers_in_a_decision_forbid_a_plan(device):
    """A function that looks at what a tensor holds runs as it is."""

    @prepared.prepared(1)
    def looks(x):
        return x + 1 if x.sum() > 0 else x - 1

    x = torch.ones(3, device=device)
    assert [looks(sign * x)[0].item() for sign in (1, 1, 1, -1)] == [2, 2, 2, -2]


def test_an_argument_that_is_returned_is_the_one_of_the_call(device):
    @prepared.prepared(2)
    def both(x, y):
        return y, (x, None), x[1:]

    for same in (True, True, True, False, False):  # recorded where both arguments are one tensor
        x = torch.rand(3, device=device)
        y = x if same else torch.rand(3, device=device)
        a, (b, none), part = both(x, y)
        assert a is y and b is x and none is None and torch.equal(part, x[1:])


def test_parts_of_new_memory(device):
    """They are views of the whole memory, where an operator of torch's wrote to it and where none did."""

    @prepared.prepared(1)
    def parts(x):
        y, unwritten = x.new_empty(2, 3), x.new_empty(2, 3)
        y.copy_(x)
        return y[1:], y.T, unwritten[1:]

    for _ in range(4):
        x = torch.rand(2, 3, device=device)
        last, turned, unwritten = parts(x)
        assert torch.equal(last, x[1:]) and torch.equal(turned, x.T)
        assert (*unwritten.shape, unwritten.storage_offset(), unwritten.untyped_storage().nbytes()) == (1, 3, 3, 24)


def test_options_outside_a_plan_are_checked(device):
    """Grouped heads run by the plan of a call that allowed them, and are refused where they are not allowed."""
    q, k = torch.ones(1, 4, 3, 8, device=device), torch.ones(1, 2, 3, 8, device=device)
    for _ in range(4):
        F.scaled_dot_product_attention(q, k, k, enable_gqa=True)
        with pytest.raises(ValueError, match="Hk must divide H"):
            F.scaled_dot_product_attention(q, k, k)


def test_a_subclass_has_no_plan(device):
    class Own(torch.Tensor):
        pass

    x = torch.ones(3, 8, device=device).as_subclass(Own)
    for _ in range(4):
        assert type(F.linear(x, torch.ones(5, 8, device=device))) is Own
    assert not any(Own in key[1] for function in prepared._functions for key in function.plans)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a capture needs a GPU")
def test_plans_are_captured():
    x, w = torch.randn(64, 128, device="cuda"), torch.randn(256, 128, device="cuda")
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            F.linear(x, w, activation="gelu")
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        y = F.linear(x, w, activation="gelu")
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, F.linear(x, w, activation="gelu"))
