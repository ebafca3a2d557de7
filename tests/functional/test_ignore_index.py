"""linear_log_prob of rows whose target is ignored, and targets that are neither classes nor ignored."""

import pytest
import torch

from primer_fast import functional as F
from primer_fast.kernels.linear_log_prob import linear_log_prob_bwd, linear_log_prob_fwd
from primer_fast.kernels.product import MatmulSettings
from primer_fast.proof.numerics import exact, worst
from primer_fast.reference.linear_log_prob import linear_log_prob, linear_log_prob_grad

PATHS = ["kernels", "kept", "chunks", "logits in memory"]
DTYPES = [torch.float32, torch.bfloat16]


def operands(device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 6, 8), (40, 8), (40,)
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]


def outputs_and_gradients(call, leaves):
    outputs = call()
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
    return outputs, torch.autograd.grad(outputs, leaves, upstream)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ignore_index", [None, -100, 3, 2**40])
def test_padding_adds_nothing(path, dtype, ignore_index, take_path):
    """Log-probability, entropy and gradients are those of the other rows alone, by PyTorch in float64."""
    device, options = take_path(path), {"temperature": 0.8, "return_entropy": True}
    x, w, b = operands(device, dtype)
    padding = -100 if ignore_index is None else ignore_index
    target = torch.arange(12, device=device).view(2, 6) + 1
    target[0, 2:], target[1, 5] = padding, padding
    counts = target != padding

    def ours():
        told = {"ignore_index": ignore_index, "keep_logits": path == "kept", **options}
        return F.linear_log_prob(x, w, target, linear_bias=b, **told)

    exact = [t.detach().double().requires_grad_() for t in (x, w, b)]

    def theirs():
        log_p = torch.nn.functional.linear(exact[0], exact[1], exact[2]).div(0.8).log_softmax(dim=-1)
        chosen = log_p.gather(-1, target.masked_fill(~counts, 0)[..., None])[..., 0]
        entropy = -(log_p.exp() * log_p).sum(dim=-1)
        return torch.where(counts, chosen, 0), torch.where(counts, entropy, 0)

    got, grads = outputs_and_gradients(ours, (x, w, b))
    want, right = outputs_and_gradients(theirs, exact)
    for y in got:
        assert not y[~counts].any() and not y[~counts].signbit().any()
    assert not grads[0][~counts].any()
    loose = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 3e-2, "atol": 6e-2}
    torch.testing.assert_close(got, want, check_dtype=False, **loose)
    torch.testing.assert_close(grads, right, check_dtype=False, **loose)


@pytest.mark.parametrize("chunk", [None, (32, 32), (16, 48)])
def test_chunks_of_classes_and_rows_ignore_the_same_rows(chunk, device):
    """The ignored index is that of the whole vocabulary, 35 and 3 in turn, not of a chunk's classes."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(s, generator=generator).to(device) for s in ((40, 8), (72, 8)))
    dy, dentropy = torch.randn(2, 40, generator=generator).to(device)
    target, tile = torch.arange(40, device=device), MatmulSettings(16, 16, 16, 4, 2, SPLITS=2)
    for ignore_index in (35, 3):
        target[::3] = ignore_index
        told = x, w, None, target
        y, lse, entropy, _ = linear_log_prob_fwd(*told, 0.8, True, "highest", tile, ignore_index=ignore_index)
        upstream, saved, wanted = (dy, dentropy), (lse, entropy, 0.8), (True, True, False)
        dx, dw, _ = linear_log_prob_bwd(
            *upstream, *told, *saved, wanted, "highest", tile, chunk, ignore_index=ignore_index
        )
        options = {"temperature": 0.8, "return_entropy": True, "ignore_index": ignore_index}
        arrays = exact(x), exact(w), target.cpu().numpy()
        grads = linear_log_prob_grad((exact(dy), exact(dentropy)), *arrays, **options)
        right = [*linear_log_prob(*arrays, **options), grads["input"], grads["linear_weight"]]
        for got, want in zip((y, entropy, dx, dw), right, strict=True):
            assert worst(exact(got), want) < 1e-4


@pytest.mark.parametrize("path", PATHS)
def test_the_second_derivative_ignores_them_too(path, take_path):
    device = take_path(path)
    x, w, _ = operands(device)
    target = torch.tensor([[3, -100, 5, -100, 0, 1]] * 2, device=device)
    kept = target != -100

    def penalty(rows, targets):
        y, entropy = F.linear_log_prob(rows, w, targets, return_entropy=True)
        (dx,) = torch.autograd.grad(y.square().sum() + entropy.sum(), rows, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), w)[0]

    torch.testing.assert_close(penalty(x, target), penalty(x[kept], target[kept]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("function", [F.linear_log_prob, F.linear_cross_entropy])
@pytest.mark.parametrize("path", ["chunks", "logits in memory"])
def test_what_is_neither_class_nor_ignored_is_an_error_on_a_cpu(function, path, take_path):
    x, w, _ = operands(take_path(path))
    rows, wrong = x[0], torch.tensor([4, -100, 39, 40, 0, -1])
    name = function.__name__
    with pytest.raises(IndexError, match=rf"{name}: target must be in \[0, 40\) or ignore_index -100; got 40"):
        function(rows, w, wrong)
    with pytest.raises(IndexError, match=r"ignore_index 40; got -1$"):
        function(rows, w, torch.tensor([4, 40, 39, 40, 0, -1]), ignore_index=40)
