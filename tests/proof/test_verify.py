import numpy as np
import pytest
import torch

from primer_fast import functional
from primer_fast.proof import verify
from primer_fast.proof.numerics import budget


@pytest.fixture
def wrong_linear(monkeypatch):
    """linear whose output is off by one part in a hundred; its gradients too."""
    right = functional.linear
    monkeypatch.setattr(functional, "linear", lambda *args, **options: 1.01 * right(*args, **options))


def one_case():
    return verify.cases_to_verify(["linear"], ["float32"], ["primer_first"])


def test_a_right_kernel_passes_with_every_tensor_named():
    rows = [row for unit in one_case() for row in verify.check(*unit)]
    assert all(row.passed for row in rows)
    assert {row.tensor for row in rows} == {
        "output", "input", "weight", "bias", "input alone", "weight alone", "bias alone"
    }  # fmt: skip


def test_a_wrong_kernel_fails_in_every_tensor(wrong_linear):
    rows = [row for unit in one_case() for row in verify.check(*unit)]
    assert rows and not any(row.passed for row in rows)


def test_a_result_of_another_dtype_fails(monkeypatch):
    right = functional.linear
    monkeypatch.setattr(functional, "linear", lambda *args, **options: right(*args, **options).double())
    output = verify.check(*one_case()[0])[0]
    assert output.tensor == "output" and output.error == float("inf") and not output.passed


def test_inputs_are_the_same_at_every_call():
    case = one_case()[0].case
    first, second = (verify.draw("linear", case, torch.float32, "cpu") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in case.shapes)


def test_budget_follows_pytorch_and_the_size_of_what_is_summed():
    want = np.array([1.0, -2.0])
    eps = torch.finfo(torch.bfloat16).eps
    assert budget(torch.bfloat16, 0.0, want) == 2 * eps
    assert budget(torch.bfloat16, 0.1, want) == pytest.approx(0.2 + 2 * eps)
    assert budget(torch.float32, 0.0, np.zeros(1), magnitude=100.0) == pytest.approx(
        200 * torch.finfo(torch.float32).eps
    )
