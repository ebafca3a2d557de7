"""Ops under autograd's modes: what needs no gradient has none, and how often it is asked for does not matter."""

import itertools

import pytest
import torch
from catalogue import OPS, run, upstream

from primer_fast import backend, nn

ops = pytest.mark.parametrize("name", OPS)


@pytest.fixture
def inputs(name, place):
    return OPS[name].floats(torch.float32, place)


def gradients(name, inputs):
    return run(OPS[name].ours, inputs)[1:]


@pytest.fixture
def want(name, inputs):
    return gradients(name, inputs)


@ops
def test_no_grad_and_inference_mode(name, inputs):
    want = OPS[name].ours(*inputs)
    assert want.requires_grad
    with torch.no_grad():
        got = OPS[name].ours(*inputs)
    with torch.inference_mode():
        inferred = OPS[name].ours(*inputs)
    assert not got.requires_grad and not inferred.requires_grad and inferred.is_inference()
    torch.testing.assert_close((got, inferred), (want.detach(),) * 2, rtol=1e-5, atol=1e-6)


@ops
def test_tensors_of_inference_mode(name, inputs, want):
    """They are taken without gradients; a training step on others follows as if nothing had been."""
    with torch.inference_mode():
        made = [x.detach().clone() for x in inputs]
    assert made[0].is_inference()
    with torch.no_grad():
        torch.testing.assert_close(OPS[name].ours(*made), OPS[name].ours(*inputs), rtol=0, atol=0)
    assert all(map(torch.equal, gradients(name, inputs), want))


@ops
def test_every_subset_of_gradients(name, inputs, want):
    """Only some inputs require one; and all do, but only some are asked for."""
    subsets = list(itertools.product((True, False), repeat=len(inputs)))[:-1]
    if backend.interpreting and len(inputs) > 1:
        subsets = [s for s in subsets if sum(s) == 1]  # all would take a minute
    for chosen in subsets:
        wanted = [g for g, keep in zip(want, chosen, strict=True) if keep]
        some = [x if keep else x.detach() for x, keep in zip(inputs, chosen, strict=True)]
        for arguments in (some, inputs):
            y = OPS[name].ours(*arguments)
            asked = [x for x, keep in zip(inputs, chosen, strict=True) if keep]
            got = torch.autograd.grad(y, asked, upstream(y))
            torch.testing.assert_close(list(got), wanted, rtol=1e-5, atol=1e-6)


@ops
def test_twice_through_one_graph(name, inputs):
    y = OPS[name].ours(*inputs)
    first = torch.autograd.grad(y, inputs, upstream(y), retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(y, inputs, upstream(y))))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y, inputs, upstream(y))


@ops
def test_accumulates_into_grad(name, inputs, want):
    for _ in range(2):
        y = OPS[name].ours(*inputs)
        y.backward(upstream(y))
    torch.testing.assert_close([x.grad for x in inputs], [2 * g for g in want], rtol=1e-6, atol=1e-7)


MODES = {
    "anomaly detection": torch.autograd.detect_anomaly,
    "saved on the CPU": torch.autograd.graph.save_on_cpu,
    "saved as copies": lambda: torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("mode", MODES)
@ops
def test_modes_that_watch_the_graph(name, mode, inputs, want):
    with MODES[mode]():
        assert all(map(torch.equal, gradients(name, inputs), want))


@ops
def test_a_changed_input_is_an_error(name, inputs, want):
    """Written to after the forward, it would give a wrong gradient; what an op does not keep may change."""
    y = OPS[name].ours(*inputs)
    with torch.no_grad():
        inputs[0].mul_(2)
    try:
        got = torch.autograd.grad(y, inputs, upstream(y))
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("reentrant", [True, False])
@ops
def test_activation_checkpointing(name, reentrant, inputs, want):
    y = torch.utils.checkpoint.checkpoint(OPS[name].ours, *inputs, use_reentrant=reentrant)
    y.backward(upstream(y))  # a reentrant one knows no torch.autograd.grad
    assert all(map(torch.equal, [x.grad for x in inputs], want))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_draws_the_same_dropout(reentrant, place):
    layer = nn.MultiheadAttention(16, 2, dropout=0.5, batch_first=True, device=place)
    x = torch.randn(2, 6, 16, device=place, requires_grad=True)

    def run(x):
        return layer(x, x, x, need_weights=False)[0]

    results = []
    for checkpointed in (False, True):
        torch.manual_seed(5)
        y = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=reentrant) if checkpointed else run(x)
        noise = torch.rand(3)  # the generator has moved on when the forward runs again
        x.grad, layer.in_proj_weight.grad = None, None
        y.backward(upstream(y))
        results.append((y.detach(), x.grad, layer.in_proj_weight.grad, noise))
    assert all(map(torch.equal, *results))
    torch.manual_seed(6)
    assert not torch.equal(run(x), results[0][0]), "nothing was dropped"
