"""linear_cross_entropy with weights of classes and with probabilities as target, and the dtype of its loss."""

import itertools

import pytest
import torch
import torch.nn.functional as torch_F
from functional.wrong_calls import refuses

from primer_fast import functional as F
from primer_fast.functional import logits, weighted_losses

REDUCTIONS = ["mean", "sum", "none"]


def operands(device, dtype=torch.float32, lead=(5,)):
    generator = torch.Generator().manual_seed(0)
    shapes = (*lead, 6), (20, 6), (20,)
    x, w, b = (torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes)
    weight = torch.rand(20, generator=generator).to(device, dtype)
    weight[3] = 0
    indices = torch.randint(20, lead, generator=generator).to(device)
    probabilities = torch.randn(*lead, 20, generator=generator).softmax(dim=-1).to(device, dtype)
    return (x, w, b), weight, indices, probabilities


def both(leaves, target, weight=None, **options):
    """Loss and gradients: ours, and torch's in float64."""
    x, w, b = leaves
    exact = [t.detach().double().requires_grad_() for t in leaves]
    wide = [t if t is None or not t.is_floating_point() else t.double() for t in (target, weight)]
    ours = F.linear_cross_entropy(x, w, target, linear_bias=b, weight=weight, **options)
    rows = torch_F.linear(*exact).flatten(0, -2) if x.dim() > 1 else torch_F.linear(*exact)
    flat = wide[0] if x.dim() == 1 else wide[0].reshape(rows.shape if wide[0].is_floating_point() else -1)
    options = {k: v for k, v in options.items() if k != "loss_dtype"}
    theirs = torch_F.cross_entropy(rows, flat, weight=wide[1], **options)
    upstream = torch.linspace(0.5, 2, theirs.numel(), dtype=torch.float64, device=x.device).view(theirs.shape)
    got = torch.autograd.grad(ours, leaves, upstream.view(ours.shape).to(ours.dtype))
    return (ours, *got), (theirs.view(ours.shape), *torch.autograd.grad(theirs, exact, upstream))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weights_of_classes(reduction, smoothing, place):
    """As torch has it in float64: the mean divides by the weights of the targets, ignored ones aside."""
    leaves, weight, target, _ = operands(place)
    target[1], target[3] = -100, 3
    for ignore_index in (-100, 3):
        target = target.where(target != -100, ignore_index)
        got, want = both(
            leaves, target, weight, reduction=reduction, ignore_index=ignore_index, label_smoothing=smoothing
        )
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5, check_dtype=False)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_probabilities(reduction, smoothing, weighted, place):
    leaves, weight, _, target = operands(place)
    weight = weight if weighted else None
    got, want = both(leaves, target, weight, reduction=reduction, label_smoothing=smoothing)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5, check_dtype=False)


def test_leading_axes_one_row_and_no_row(place):
    for lead in ((2, 3), (), (0,)):
        leaves, weight, indices, probabilities = operands(place, lead=lead)
        for target, reduction in itertools.product((indices, probabilities), ("none", "mean")):
            if lead == () and reduction == "mean":
                continue
            got, want = both(leaves, target, weight, reduction=reduction)
            torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5, check_dtype=False, equal_nan=True)


def test_a_mean_over_no_weight_is_nan(place):
    (x, w, _), weight, target, _ = operands(place)
    assert F.linear_cross_entropy(x, w, torch.full_like(target, 3), weight=weight).isnan()
    assert F.linear_cross_entropy(x, w, torch.full_like(target, -100), weight=weight).isnan()


def test_probabilities_have_gradients(place):
    (x, w, b), weight, _, target = operands(place)
    target.requires_grad_()
    (got,) = torch.autograd.grad(F.linear_cross_entropy(x, w, target, linear_bias=b, weight=weight), target)
    log_p = torch_F.linear(x, w, b).log_softmax(dim=-1)
    torch.testing.assert_close(got, -(weight * log_p) / 5)


def test_one_class_with_all_probability_is_that_class(place):
    (x, w, _), weight, target, _ = operands(place)
    sure = torch_F.one_hot(target, 20).float()
    for options in ({}, {"weight": weight}, {"weight": weight, "label_smoothing": 0.2}):
        got = F.linear_cross_entropy(x, w, sure, reduction="none", **options)
        torch.testing.assert_close(got, F.linear_cross_entropy(x, w, target, reduction="none", **options))


def test_only_a_chunk_of_logits_is_in_memory(plain_path, monkeypatch):
    """Nothing that is made on the way, forward or backward, is as large as all logits."""
    monkeypatch.setattr(weighted_losses, "PLAIN_BYTES", 0)
    monkeypatch.setattr(weighted_losses, "CHUNK_BYTES", 4 * 20 * 4)
    (x, w, b), weight, target, _ = operands("cpu", lead=(40,))
    seen = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            seen.extend(t.numel() for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor))
            return result

    with Sizes():
        F.linear_cross_entropy(x, w, target, linear_bias=b, weight=weight, label_smoothing=0.1).backward()
    assert seen and max(seen) < 40 * 20 / 2


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_second_derivative(kind, place):
    (x, w, _), weight, *targets = operands(place)
    target = targets[kind == "probabilities"]

    def penalty(function):
        (dx,) = torch.autograd.grad(function(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, w))

    got = penalty(lambda: F.linear_cross_entropy(x, w, target, weight=weight))
    want = penalty(lambda: torch_F.cross_entropy(x @ w.T, target, weight=weight))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["smoothed", "probabilities"])
def test_compiled_and_batched(kind, place):
    (x, w, b), weight, indices, probabilities = operands(place)
    target = probabilities if kind == "probabilities" else indices
    smoothing = 0.1 if kind == "smoothed" else 0.0

    def loss(x, target):
        return F.linear_cross_entropy(x, w, target, linear_bias=b, weight=weight, label_smoothing=smoothing)

    want = loss(x, target)
    torch.compiler.reset()
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(x, target)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(y, (x, w, b)) for y in (got, want)]
    torch.testing.assert_close(*grads)
    each = torch.stack([loss(x[i : i + 1], target[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(torch.vmap(loss)(x[:, None], target[:, None]), each)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_target_outside_the_vocabulary(smoothing, place):
    (x, w, _), weight, target, _ = operands(place)
    target[1] = 20
    options = {"weight": weight, "label_smoothing": smoothing, "reduction": "none"}
    if logits.runs_triton(x):
        y = F.linear_cross_entropy(x, w, target, **options)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert y.isnan().nonzero().tolist() == [[1]] and dx.isnan().all(dim=1).nonzero().tolist() == [[1]]
    else:
        with pytest.raises(IndexError, match=r"target must be in \[0, 20\) or ignore_index -100; got 20"):
            F.linear_cross_entropy(x, w, target, **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["plain", "smoothed", "weighted", "probabilities"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_float32_loss_of_16_bit_tensors(reduction, kind, dtype, place):
    """It is the loss of the very values, to float32's rounding but for what a CPU rounds logits to."""
    leaves, weight, indices, probabilities = operands(place, dtype)
    target = probabilities if kind == "probabilities" else indices
    options = {"reduction": reduction, "label_smoothing": 0.1 if kind == "smoothed" else 0.0}
    options |= {"weight": weight} if kind == "weighted" else {}
    got, want = both(leaves, target, loss_dtype=torch.float32, **options)
    assert got[0].dtype is torch.float32
    assert F.linear_cross_entropy(*leaves[:2], target, **options).dtype is dtype
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2, check_dtype=False)
    with torch.autocast(got[0].device.type, torch.bfloat16):
        loss = F.linear_cross_entropy(*leaves[:2], target, **options)
        assert loss.dtype is torch.float32
        assert F.linear_cross_entropy(*leaves[:2], target, loss_dtype=dtype, **options).dtype is dtype


def test_a_float32_sum_does_not_end_where_float16_does(place):
    x, w = (
        torch.zeros(400, 2, device=place, dtype=torch.float16),
        torch.zeros(20, 2, device=place, dtype=torch.float16),
    )
    b = torch.zeros(20, device=place, dtype=torch.float16)
    b[0] = 60000
    target = torch.ones(400, dtype=torch.int64, device=place)
    call = {"linear_bias": b, "reduction": "sum"}
    assert F.linear_cross_entropy(x, w, target, **call).isinf()
    assert F.linear_cross_entropy(x, w, target, loss_dtype=torch.float32, **call).item() == 400 * b[0].item()


def test_a_float32_loss_has_float32s_steps(place):
    """At ten nats a 16-bit loss moves in steps of 0.06."""
    x, w, b = (torch.zeros(s, device=place, dtype=torch.bfloat16) for s in ((3, 4), (20, 4), (20,)))
    b[1], target = 10, torch.zeros(3, dtype=torch.int64, device=place)

    def loss(x):
        return F.linear_cross_entropy(x, w, target, linear_bias=b, loss_dtype=torch.float32)

    want = torch.log(torch.tensor(10.0, dtype=torch.float64).exp() + 19).float().to(place)
    torch.testing.assert_close(loss(x), want, rtol=1e-6, atol=0)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), want, rtol=1e-6, atol=0)


ONES, T = torch.ones, torch.zeros(3, dtype=torch.int64)
X, W = ONES(3, 4), ONES(2, 4)
WRONG = [
    (TypeError, "weight must be a tensor of floating-point numbers or None; got list", T, {"weight": [1.0, 1.0]}),
    (TypeError, "weight must be a tensor of floating-point numbers or None; got torch.int64", T,
     {"weight": torch.ones(2, dtype=torch.int64)}),
    (ValueError, r"weight must have one element per row of linear_weight; got weight \(3,\)", T, {"weight": ONES(3)}),
    (ValueError, "got linear_weight cpu, weight meta", T, {"weight": torch.ones(2, device="meta")}),
    (ValueError, "weight must not require a gradient", T, {"weight": torch.ones(2, requires_grad=True)}),
    (ValueError, r"one element per row of input and class; got target \(3, 3\)", ONES(3, 3), {}),
    (ValueError, r"one element per row of input and class; got target \(3,\)", ONES(3), {}),
    (ValueError, "probabilities have none; got 1", ONES(3, 2), {"ignore_index": 1}),
    (TypeError, "loss_dtype must be a floating-point torch.dtype or None; got torch.int64", T,
     {"loss_dtype": torch.int64}),
]  # fmt: skip


CALLS = [(error, message, (X, W, target), options) for error, message, target, options in WRONG]
test_wrong_arguments = refuses("linear_cross_entropy", CALLS)


def test_logits_that_16_bits_cannot_hold(either):
    """The logits and the sums of rows are float32; only the loss is rounded."""
    x, row = torch.full((4, 16), 100.0, device=either).half(), torch.full((1, 16), 100.0, device=either).half()
    target = torch.ones(4, dtype=torch.int64, device=either)
    loss = F.linear_cross_entropy(x, torch.cat([row, -row]), target, loss_dtype=torch.float32)
    assert loss.item() == 320000
    assert F.linear_log_prob(x, torch.cat([row, -row]), target).tolist() == [-320000] * 4
    x = torch.zeros(1200, 1, device=either, dtype=torch.bfloat16)
    loss = F.linear_cross_entropy(x, x[:2], x[:, 0].long(), reduction="sum")
    assert loss.dtype == torch.bfloat16 and loss.item() == 832  # 831.78 rounded once
