"""Loss heads on every path: classes that a bias takes out of the vocabulary; their cases, on PyTorch's operators."""

import pytest
import torch

from primer_fast import functional as F
from primer_fast.proof import verify

MASKS = {  # what masks, as a share of the dtype's least number, and which classes
    "infinite tail": (torch.inf, slice(8, None)),
    "infinite head": (torch.inf, slice(0, 30)),
    "least tail": (1.0, slice(8, None)),
    "least head": (1.0, slice(0, 30)),
    "half of the least, tail": (0.5, slice(8, None)),
    "half of the least, head": (0.5, slice(0, 30)),
}


def operands(device, mask, dtype):
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(s, generator=generator).to(device, dtype) for s in ((3, 4), (40, 4), (40,)))
    share, classes = MASKS[mask]
    b[classes] = share * torch.finfo(dtype).min
    return [t.requires_grad_() for t in (x, w, b)], torch.tensor([1, 32, 7], device=device)


def near(got, want, dtype):
    """Equal up to the rounding of the inputs' dtype; what float32 cannot hold may be infinite."""
    limit, rounding = torch.finfo(torch.float32).max, 1e-5 if dtype is torch.float32 else 2e-2
    for y, right in zip(got, want, strict=True):
        assert (y.isfinite() | (right.abs() > limit)).all()
        y, right = (t.double().clamp(-limit, limit) for t in (y, right))
        scale = right[right.abs() < 1e30].abs().max().item()
        torch.testing.assert_close(y, right, rtol=rounding, atol=rounding * scale, check_dtype=False)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("upstream", "temperature"), [(2.0, 1.0), (65536.0, 0.5)])
def test_entropy_and_log_probability(mask, dtype, upstream, temperature, place):
    """0 log 0 = 0, and its gradient 0, whatever it is multiplied by: as PyTorch has it in float64."""
    leaves, target = operands(place, mask, dtype)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    x, w, b = leaves
    y, entropy = F.linear_log_prob(x, w, target, linear_bias=b, temperature=temperature, return_entropy=True)
    log_p = (torch.nn.functional.linear(*exact) / temperature).log_softmax(dim=-1)
    right = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(dim=-1)
    near([y, entropy], [log_p.gather(1, target[:, None])[:, 0], right], dtype)
    got = torch.autograd.grad((upstream * entropy).sum(), leaves)
    near(got, torch.autograd.grad((upstream * right).sum(), exact), dtype)


@pytest.mark.parametrize("mask", MASKS)
def test_cross_entropy(mask, place):
    (x, w, b), target = operands(place, mask, torch.float32)
    exact = [t.detach().double().requires_grad_() for t in (x, w, b)]
    loss = F.linear_cross_entropy(x, w, target, linear_bias=b, reduction="none")
    right = torch.nn.functional.cross_entropy(torch.nn.functional.linear(*exact), target, reduction="none")
    near([loss], [right], torch.float32)
    got = torch.autograd.grad((2 * loss).sum(), (x, w, b))
    near(got, torch.autograd.grad((2 * right).sum(), exact), torch.float32)


def test_smoothed_labels_over_logits_that_are_all_large(small_chunks):
    """Their sum overflows, and their differences are what counts."""
    x, w, b = torch.zeros(3, 4), torch.zeros(40, 4), torch.full((40,), torch.finfo(torch.float32).min)
    target = torch.tensor([1, 32, 7])
    got = F.linear_cross_entropy(x, w, target, linear_bias=b, label_smoothing=0.1)
    torch.testing.assert_close(got, torch.tensor(40.0).log())


DERIVATIVES = [
    (F.linear_log_prob, {"temperature": 0.7, "return_entropy": True}),
    *((F.linear_cross_entropy, {"label_smoothing": 0.1, "reduction": reduction}) for reduction in ("mean", "none")),
]


@pytest.mark.parametrize("function, options", DERIVATIVES, ids=["log_prob", "mean", "none"])
def test_chunks_on_pytorch_have_the_derivative_of_their_output(function, options, small_chunks):
    torch.manual_seed(0)
    x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((7, 3), (37, 3), (37,)))
    target = torch.randint(37, (7,))
    target[2] = -100

    def run(x, w, b):
        return function(x, w, target, linear_bias=b, **options)

    assert torch.autograd.gradcheck(run, (x, w, b))
    assert torch.autograd.gradgradcheck(run, (x, w, b), fast_mode=True)


HEADS = [(op, case) for op in ("linear_cross_entropy", "linear_log_prob") for case in verify.cases(op, native=False)]


@pytest.mark.parametrize("dtype", verify.DTYPES)
@pytest.mark.parametrize("op, case", HEADS, ids=str)
def test_chunks_on_pytorch_match_the_reference(op, case, dtype, small_chunks, monkeypatch):
    monkeypatch.setattr(verify, "device", lambda: "cpu")
    rows = verify.check(op, case, verify.DTYPES[dtype])
    assert [row for row in rows if not row.passed] == []
