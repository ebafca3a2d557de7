"""The multilayer perceptron as one function: values, what it keeps, what it leaves out, what it launches."""

import json
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from compiling import printed_where_kernels_compile
from functional.wrong_calls import refuses

from primer_fast import functional as F
from primer_fast.functional.mlp import mlp_plain
from primer_fast.kernels import matmul
from primer_fast.kernels import mlp as kernels_mlp
from primer_fast.kernels.prepass import prepass
from primer_fast.proof.numerics import budget, exact, worst
from primer_fast.reference.case import arguments
from primer_fast.reference.mlp import mlp_grad


def test_arrays_of_a_case_become_arguments():
    arrays = {"input": 1, "weights.0": 2, "weights.1": 3, "biases.1": 4}
    assert arguments(arrays) == {"input": 1, "weights": [2, 3], "biases": [None, 4]}


def made(device, *widths, rows=24, dtype=torch.float32):
    """An input, weights and biases that require gradients."""
    torch.manual_seed(0)
    x = torch.randn(rows, widths[0], device=device)
    weights = [torch.randn(n, k, device=device) / k**0.5 for k, n in pairwise(widths)]
    biases = [torch.randn(n, device=device) for n in widths[1:]]
    leaf = [t.to(dtype).requires_grad_() for t in (x, *weights, *biases)]
    return leaf[0], leaf[1 : len(weights) + 1], leaf[len(weights) + 1 :]


def one_by_one(x, weights, biases, *, activation="gelu", output_activation=None):
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        x = F.linear(x, w, b, activation=output_activation if i == len(weights) - 1 else activation)
    return x


OPTIONS = [(None, None), ("gelu", None), ("relu", "sigmoid"), ("silu", "gelu"), ("tanh", None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation, output_activation", OPTIONS)
def test_equals_layers_one_by_one(activation, output_activation, dtype, device):
    """The forward is the same launches; gradients are rounded once less below an activation."""
    options = {"activation": activation, "output_activation": output_activation}
    x, weights, biases = made(device, 40, 56, 24, 16, dtype=dtype)
    leaves, dy = [x, *weights, *biases], torch.randn(24, 16, device=device).to(dtype)
    got, want = F.mlp(x, weights, biases, **options), one_by_one(x, weights, biases, **options)
    assert torch.equal(got, want)
    true = mlp_grad(exact(dy), exact(x), [*map(exact, weights)], [*map(exact, biases)], **options)
    names = ["input", *(f"{kind}.{i}" for kind in ("weights", "biases") for i in range(3))]
    plain = torch.autograd.grad(want, leaves, dy)
    for name, ours, theirs in zip(names, torch.autograd.grad(got, leaves, dy), plain, strict=True):
        allowed = budget(dtype, worst(exact(theirs), true[name]), true[name], 40.0)
        assert worst(exact(ours), true[name]) <= allowed, name


def products(monkeypatch):
    """Shapes of the products that are made from here on, those that sum their rows, the passes over memory."""
    seen, summed, whole, passes = [], [], matmul.matmul, []

    def watched(a, b, *rest, **options):
        seen.append((a.shape[0], b.shape[0], a.shape[1], options.get("slope_of")))
        summed.extend([a.shape[0]] * (options.get("sums_dtype") is not None))
        return whole(a, b, *rest, **options)

    for module in (kernels_mlp, sys.modules["primer_fast.kernels.linear"]):
        monkeypatch.setattr(module, "matmul", watched)
        monkeypatch.setattr(module, "prepass", lambda *a: passes.append(1) or prepass(*a))
    return seen, summed, passes


# Widths 6 -> 7 -> 8 -> 9, 5 rows. Leaves that require gradients, and the products of the backward
DX, DZ1, DZ2 = (5, 6, 7, None), (5, 7, 8, "gelu"), (5, 8, 9, "gelu")
DW1, DW2, DW3 = (7, 6, 5, None), (8, 7, 5, None), (9, 8, 5, None)
NEEDED = {
    "all": ("xuvwabc", [DW3, DZ2, DW2, DZ1, DW1, DX]),
    "the input": ("x", [DZ2, DZ1, DX]),
    "the first weight": ("u", [DZ2, DZ1, DW1]),
    "the second layer": ("vb", [DZ2, DW2]),
    "the last weight": ("w", [DW3]),
    "the last bias": ("c", [(9, 0, 5, None)]),
    "the first bias": ("a", [DZ2, DZ1, (7, 0, 5, None)]),
    "first and last weight": ("uw", [DW3, DZ2, DZ1, DW1]),
    "biases": ("abc", [(9, 0, 5, None), DZ2, (8, 0, 5, None), DZ1, (7, 0, 5, None)]),
}


@pytest.mark.parametrize("output_activation", [None, "silu"])
@pytest.mark.parametrize("case", NEEDED)
def test_only_what_is_needed_is_computed(case, output_activation, device, monkeypatch):
    chosen, wanted = NEEDED[case]
    x, weights, biases = made(device, 6, 7, 8, 9, rows=5)
    named = dict(zip("xuvwabc", (x, *weights, *biases), strict=True))
    for name, t in named.items():
        t.requires_grad_(name in chosen)
    leaves, dy = [named[name] for name in chosen], torch.randn(5, 9, device=device)
    options = {"output_activation": output_activation}
    want = torch.autograd.grad(mlp_plain(x, weights, biases, **options), leaves, dy)
    y = F.mlp(x, weights, biases, **options)
    seen, summed, passes = products(monkeypatch)
    got = torch.autograd.grad(y, leaves, dy)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    if output_activation is None:
        assert seen == wanted and not passes
    else:  # the last bias gradient comes from the pass
        assert [p for p in seen if p[0] != 9] == [p for p in wanted if p[0] != 9]
        assert not passes or 9 not in summed
        assert len(passes) == (0 if wanted[0] in (DW3, (9, 0, 5, None)) and len(wanted) == 1 else 1)


@pytest.mark.parametrize("lowest", [0, 1, 2, 3])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_what_the_forward_keeps(activation, lowest, device):
    """From the lowest layer that needs a gradient on, its input too; as layers one by one do."""
    x, weights, biases = made(device, 6, 7, 8, 9, rows=5)
    for t in (x, *weights[:lowest], *biases[:lowest]):
        t.requires_grad_(False)

    def kept(function):
        own = {}
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: own.setdefault(t.data_ptr(), t), lambda t: t)
        with hooks:
            y = function(x, weights, biases, activation=activation)
        given = {t.data_ptr() for t in (x, *weights, *biases, y)}
        return sorted(t.shape[1] for pointer, t in own.items() if pointer not in given), y.requires_grad

    assert kept(F.mlp) == kept(one_by_one)
    widths = [n for i, n in enumerate((7, 8), 1) if i >= lowest and lowest < 3]
    derivatives = [n for i, n in enumerate((7, 8)) if i >= lowest and activation == "gelu"]
    assert kept(F.mlp)[0] == sorted(widths + derivatives)


def test_a_layer_with_a_bias_before_one_without(device):
    x, weights, biases = made(device, 6, 7, 8)
    got, want = (f(x, weights, [biases[0], None], activation="relu") for f in (F.mlp, mlp_plain))
    leaves, dy = [x, *weights, biases[0]], torch.randn(24, 8, device=device)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(y, leaves, dy) for y in (got, want)), rtol=1e-4, atol=1e-5)


LAUNCHES = """
import json, torch
from primer_fast import functional as F
from primer_fast.proof.offline import offline
from triton.runtime.jit import JITFunction

def both_ways(output_activation):
    def empty(*shape):
        return torch.empty(shape, dtype=torch.bfloat16, device="meta").requires_grad_()

    x, v, w, b, c = empty(16384, 768), empty(3072, 768), empty(768, 3072), empty(3072), empty(768)
    names = []
    with offline("sm_90"):
        JITFunction.run = lambda self, *a, **o: names.append(self.__name__)
        y = F.mlp(x, (v, w), (b, c), activation="gelu_tanh", output_activation=output_activation)
        forward = len(names)
        torch.autograd.grad(y, (x, v, w, b, c), torch.empty_like(y))
    return names[:forward], names[forward:]

print(json.dumps([both_ways(None), both_ways("gelu")]))
"""


def test_launches_of_gpt2():
    """A launch for each product, and one where a sum over rows was split; a pass over memory for an output alone."""
    (forward, backward), (_, with_output) = json.loads(printed_where_kernels_compile("-c", LAUNCHES))
    assert forward == ["matmul_kernel"] * 2
    assert backward.count("matmul_kernel") == 4 and set(backward) <= {"matmul_kernel", "reduce_partials_kernel"}
    assert backward.count("reduce_partials_kernel") <= 2
    assert with_output[0] == "activation_prepass_kernel" and with_output.count("activation_prepass_kernel") == 1
    assert with_output.count("matmul_kernel") == 4


ONES = torch.ones
PAIR = (ONES(2, 4), ONES(3, 2))
WRONG = [
    (ValueError, r"got 0 weights", (ONES(3, 4), ()), {}),
    (ValueError, r"got 2 weights and 1 biases", (ONES(3, 4), PAIR, (ONES(2),)), {}),
    (ValueError, r"weights\[0\] must have shape \(n, 4\), as input has 4 features; got \(2, 5\)",
     (ONES(3, 4), (ONES(2, 5),)), {}),
    (ValueError, r"weights\[1\] must have shape \(n, 2\), as layer 0 has 2 features; got \(3, 4\)",
     (ONES(3, 4), (ONES(2, 4), ONES(3, 4))), {}),
    (ValueError, r"weights\[0\] .* got \(4,\)", (ONES(3, 4), (ONES(4),)), {}),
    (ValueError, r"input must have one axis at least; got \(\)", (torch.tensor(1.0), PAIR), {}),
    (ValueError, r"biases\[1\] .* got \(2,\) and \(3, 2\)", (ONES(3, 4), PAIR, (None, ONES(2))), {}),
    (TypeError, r"input torch.float32 and weights\[1\] torch.float16", (ONES(3, 4), (PAIR[0], PAIR[1].half())), {}),
    (TypeError, r"biases\[0\] torch.bfloat16", (ONES(3, 4), PAIR, (ONES(2).bfloat16(), None)), {}),
    (TypeError, r"input must be a tensor; got list", ([1.0], PAIR), {}),
    (TypeError, r"weights must be a sequence of tensors; got Tensor", (ONES(3, 4), PAIR[0]), {}),
    (TypeError, r"weights must be a sequence of tensors; got NoneType", (ONES(3, 4), None), {}),
    (TypeError, r"biases must be a sequence of tensors; got Tensor", (ONES(3, 4), PAIR, ONES(2)), {}),
    (TypeError, r"weights must hold tensors; got ndarray at 1", (ONES(3, 4), (PAIR[0], np.ones((3, 2)))), {}),
    (TypeError, r"biases must hold tensors; got float at 0", (ONES(3, 4), PAIR, (1.0, None)), {}),
    (ValueError, r"weights\[1\] meta", (ONES(3, 4), (PAIR[0], torch.ones(3, 2, device="meta"))), {}),
    (ValueError, r"one of relu, .*; got 'swish'", (ONES(3, 4), PAIR), {"activation": "swish"}),
    (ValueError, r"one of relu, .*; got 'swish'", (ONES(3, 4), PAIR), {"output_activation": "swish"}),
]  # fmt: skip

test_wrong_arguments = refuses("mlp", WRONG)
