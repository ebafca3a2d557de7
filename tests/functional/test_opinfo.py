"""PyTorch's own samples of each operator: what it is called with, and what it must refuse."""

import functools

import pytest
import torch

from primer_fast import functional as F

# Op -> how many samples the kernels get in the interpreter, in float32; the CPU path gets all of them
OPS = {
    "linear": 9, "conv2d": 6, "layer_norm": 4, "embedding": 3, "scaled_dot_product_attention": 6, "max_pool2d": 8,
}  # fmt: skip

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@functools.cache
def info_of(op):
    pytest.importorskip("expecttest", reason="torch.testing._internal needs expecttest")
    from torch.testing._internal.common_methods_invocations import op_db  # takes seconds

    return next(info for info in op_db if info.name == f"nn.functional.{op}")


def samples(op, dtype, device):
    drawn = info_of(op).sample_inputs(device, dtype, requires_grad=True)
    drawn = [sample for sample in drawn if not sample.kwargs.get("dropout_p")]  # two calls would drop different weights
    return [arguments(op, sample) for sample in drawn]


def arguments(op, sample):
    """A sample as the function takes it: those of embedding have the table first."""
    if op == "embedding":
        sample.input, sample.args = sample.args[0], (sample.input, *sample.args[1:])
    return sample


def compare(op, sample, tolerance):
    """Values, gradients, shapes, dtypes and strides against PyTorch."""
    leaves = [t for t in (sample.input, *sample.args, *sample.kwargs.values()) if isinstance(t, torch.Tensor)]
    leaves = [t for t in leaves if t.requires_grad]
    got = getattr(F, op)(sample.input, *sample.args, **sample.kwargs)
    want = getattr(torch.nn.functional, op)(sample.input, *sample.args, **sample.kwargs)
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    got, want = (y[0] if isinstance(y, tuple) else y for y in (got, want))
    if leaves and want.requires_grad:
        dy = torch.randn_like(want)
        grads = (torch.autograd.grad(y, leaves, dy, allow_unused=True) for y in (got, want))
        torch.testing.assert_close(*grads, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_samples_through_the_kernels(op, device):
    chosen = samples(op, torch.float32, device)
    if device == "cpu":
        step = max(1, len(chosen) // OPS[op])
        chosen = chosen[::step][: OPS[op]]
    assert len(chosen) >= OPS[op]
    for sample in chosen:
        compare(op, sample, 1e-4)


@pytest.mark.parametrize("op", OPS)
def test_all_samples_on_the_plain_path(op, plain_path):
    for sample in samples(op, torch.float32, "cpu"):
        compare(op, sample, 1e-5)


@pytest.mark.parametrize("op", OPS)
def test_what_torch_refuses_is_refused(op, device):
    """With a message that names the op, before anything is launched."""
    errors = list(info_of(op).error_inputs(device)) if info_of(op).error_inputs_func else []
    for error in errors:
        sample = arguments(op, error.sample_input)
        with pytest.raises((ValueError, TypeError), match=f"^{op}: .*; got "):
            getattr(F, op)(sample.input, *sample.args, **sample.kwargs)
