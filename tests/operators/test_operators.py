"""Every registered operator as PyTorch's own checks see it, on the calls that the public functions make."""

import pytest
import torch
from catalogue import GROWING, SAMPLES, run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

OPERATORS = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("primer_fast::")}
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
REDUCED = {"primer_fast::linear_cross_entropy_reduced"}  # in every call of linear_cross_entropy for one number


class Recorder(TorchDispatchMode):
    """Keeps the calls of our operators."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "primer_fast":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def calls_of(sample, device):
    """Forward and backward operator calls of a sample."""
    torch.manual_seed(0)
    with Recorder() as recorder:
        run(sample.call, sample.make(device))
    return recorder.calls


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_opcheck(sample, device):
    """Schema, autograd registration, fake tensors with exact strides; for one sample each AOTAutograd with any size."""
    calls = calls_of(sample, device)
    own = (f"primer_fast::{sample.operator}", *REDUCED)
    assert calls and all(func.name().startswith(own) for func, _ in calls)
    for func, args in calls:
        if "backward" in func.name():  # has no derivative of its own
            args = tree_map_only(torch.Tensor, torch.Tensor.detach, args)
        torch.library.opcheck(func, args, test_utils=CHECKS if sample in GROWING.values() else CHECKS[:3])


@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.why in ("no gradient", "decoding")], ids=str)
def test_without_gradients_nothing_is_kept(sample, device):
    ((func, args),) = calls_of(sample, device)
    if sample.op != "linear_log_prob":  # whose log-sum-exp comes for free
        assert all(kept.numel() == 0 for kept in func(*args)[1:])


def test_every_operator_is_checked():
    forward = {f"primer_fast::{sample.operator}" for sample in SAMPLES}
    assert forward < OPERATORS and len(OPERATORS) == 24
    assert {name.split("_backward")[0] for name in OPERATORS} == forward | REDUCED
