"""torch.set_default_dtype and set_default_device reach what modules create, and nothing inside of an op."""

import pytest
import torch
from catalogue import OPS, run
from citizenship.test_modules import MODELS, MODULES, make

from primer_fast.models.generation import generate

modules = pytest.mark.parametrize("name", [*MODULES, *MODELS])


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=str)
def default_dtype(request):
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_ops_do_not_look_at_it(name, dtype, default_dtype, place):
    op = OPS[name]
    inputs = op.floats(dtype, place)
    got = run(op.ours, inputs)
    torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(got, run(op.ours, inputs), rtol=0, atol=0)
    assert {g.dtype for g in got[1:]} == {dtype}


@modules
def test_parameters_have_it(name, default_dtype):
    module = make(name)
    assert {t.dtype for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()} <= {default_dtype}


def test_a_model_of_that_dtype_trains_and_generates(default_dtype, plain_path):
    model = make("Transformer")
    tokens = torch.randint(0, 11, (2, 8))
    model.loss(tokens, tokens).backward()
    assert {p.grad.dtype for p in model.parameters()} == {default_dtype}
    assert generate(model, tokens[:, :3], max_new_tokens=3, seed=0, log_probs=True).log_probs.isfinite().all()


@modules
def test_modules_are_made_on_the_default_device(name):
    torch.set_default_device("meta")
    try:
        module = make(name)
    finally:
        torch.set_default_device(None)
    assert all(t.is_meta for t in (*module.parameters(), *module.buffers()))
    module.to_empty(device="cpu")
    assert not any(t.is_meta for t in (*module.parameters(), *module.buffers()))


@pytest.mark.parametrize("name", OPS)
def test_ops_stay_on_the_device_of_their_inputs(name, place):
    inputs = OPS[name].floats(torch.float32, place)
    want = run(OPS[name].ours, inputs)
    torch.set_default_device("meta")
    try:
        got = run(OPS[name].ours, inputs)
    finally:
        torch.set_default_device(None)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
