"""Real sizes are judged without NumPy: here that judgement is judged, on small sizes, by NumPy's."""

import math

import numpy as np
import pytest
import torch

from primer_fast import functional
from primer_fast.functional.linear import linear_plain
from primer_fast.proof import native, numerics, terms, verify
from primer_fast.proof.native import ATTENTION
from primer_fast.proof.numerics import exact
from primer_fast.proof.on_gpu import case_named, usual_case
from primer_fast.reference.case import arguments
from primer_fast.reference.ops import OPS

CASES = {
    "linear": ("edges_aligned", "no_bias", "vector", "no_rows"),
    "conv2d": ("stride_and_dilation", "groups", "unbatched", "depthwise_last"),
    "max_pool2d": ("overlapping", "ceil", "unbatched"),
    "embedding": ("padding", "position_ids_shared", "no_position", "scalar"),
    "layer_norm": ("pre_norm", "images", "no_affine", "no_bias", "vector", "no_rows", "far_from_zero"),
    "mlp": ("primer", "last_bias_alone", "silu", "vector", "no_rows"),
    "linear_cross_entropy": ("sum", "ignored", "ignored_class", "smoothed", "uniform", "peaked", "vector", "no_rows"),
    "linear_log_prob": ("entropy", "temperature", "peaked", "large", "leading_axes", "no_rows", "offset"),
    ATTENTION: ("softcap", "lengths_causal", "window", "window_offsets", "mask", "bias", "grouped_4", "offset_behind",
                "negative_scale", "no_keys", "one_query", "expanded"),
}  # fmt: skip


@pytest.fixture
def few_rows(monkeypatch):
    """Loss heads take some rows at a time here too."""
    monkeypatch.setattr(terms, "_LOGITS", 700)


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, names in CASES.items() for name in names])
def test_truth_and_magnitudes_are_the_references(op, name, few_rows):
    case, reference = case_named(op, name), OPS[op]
    arrays = native.draw(op, case, torch.bfloat16, "cpu")
    got, upstream = native.run(op, case, arrays, plain=True)
    found = native.truth(op, case, arrays, upstream, torch.float64)
    plain = arguments({name: t.numpy() if name in case.dtypes else exact(t) for name, t in arrays.items()})
    outputs = reference.function(**plain, **case.options)
    want = dict(zip(reference.outputs, outputs if isinstance(outputs, tuple) else (outputs,), strict=False))
    dy = tuple(map(exact, upstream))
    dy = dy if len(dy) > 1 else dy[0]
    want |= reference.gradient(dy, **plain, **case.options)
    assert found.keys() == want.keys() == got.keys()
    for result, value in want.items():
        np.testing.assert_allclose(found[result].numpy(), value, rtol=1e-9, atol=1e-9, err_msg=result)
    floats = {name: t.float() if t.is_floating_point() else t for name, t in arrays.items()}
    sums = terms.magnitudes(op, floats, tuple(t.float() for t in upstream), case.options)
    absolute = reference.magnitude(dy, **plain, **case.options)
    for result in want:
        assert float(sums[result]) == pytest.approx(absolute[result], rel=1e-4, abs=1e-30), result


def test_every_op_has_cases_here():
    assert CASES.keys() == set(verify.ops())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("op", verify.ops())
def test_kernels_pass(op, dtype):
    case = usual_case(op, small=True)
    rows = native.check(op, case, dtype)
    names = OPS[op].outputs
    assert rows[0].tensor == "output"
    assert [row.tensor for row in rows if row.tensor not in names] == OPS[op].differentiable(case)
    assert all(row.passed and row.error <= row.budget and not row.reason for row in rows), rows
    assert {row.truth for row in rows} == {"float64"}


@pytest.mark.parametrize("factor", [1.0, 1.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("op", verify.ops())
def test_the_verdict_is_that_of_verify(op, dtype, factor, monkeypatch):
    plain = verify.plain(op)

    def scaled(**arguments):
        y = plain(**arguments)
        return tuple(factor * t for t in y) if isinstance(y, tuple) else factor * y

    monkeypatch.setattr(functional, op, scaled)
    case = case_named(op, "no_bias") if op == "layer_norm" else usual_case(op, small=True)
    theirs = {row.tensor: row.passed for row in verify.check(op, case, dtype)}
    ours = {row.tensor: row.passed for row in native.check(op, case, dtype)}
    assert ours == {name: theirs[name] for name in ours} == dict.fromkeys(ours, factor == 1)


def broken_weight_gradient(change):
    def linear(input, weight, bias=None, *, activation=None):
        through = weight.view_as(weight)
        if through.requires_grad:
            through.register_hook(change)
        return linear_plain(input, through, bias, activation=activation)

    return linear


@pytest.mark.parametrize(
    ("change", "dtype"),
    [
        (lambda g: 1.01 * g, torch.float32),
        (lambda g: g.index_fill(0, torch.tensor([3]), math.nan), torch.bfloat16),  # a row that no kernel wrote
        (lambda g: g.index_fill(0, torch.tensor([63]), 0.0), torch.bfloat16),
        (lambda g: g.mT, torch.bfloat16),
        (lambda g: g.roll(1, 0), torch.bfloat16),
    ],
)
def test_a_wrong_gradient_fails_and_no_other(change, dtype, monkeypatch):
    monkeypatch.setattr(functional, "linear", broken_weight_gradient(change))
    rows = native.check("linear", case_named("linear", "exact_tile"), dtype)
    assert {row.tensor for row in rows if not row.passed} == {"weight"}
    weight = next(row for row in rows if row.tensor == "weight")
    assert weight.error > weight.budget if weight.error is not None else "no number" in weight.reason


def test_a_result_of_another_dtype_fails(monkeypatch):
    monkeypatch.setattr(functional, "linear", lambda *args, **options: linear_plain(*args, **options).double())
    output = native.check("linear", case_named("linear", "no_bias"), torch.float32)[0]
    assert output.passed is False and "another shape or dtype" in output.reason


def test_what_nobody_wrote_is_no_number(monkeypatch):
    monkeypatch.setattr(functional, "linear", lambda **given: linear_plain(**given) + torch.empty(48, 56))
    rows = native.check("linear", case_named("linear", "no_activation"), torch.float32)
    assert rows[0].tensor == "output" and rows[0].passed is False and rows[0].error is None


def test_poisoned_memory_leaves_the_settings_as_they_were():
    torch.use_deterministic_algorithms(False)
    with native.poisoned_memory():
        assert torch.empty(3).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    "name", ["grouped_2", "mask_of_all", "mask_of_keys", "bias", "lengths_causal", "window_offsets"]
)
def test_parts_of_attention_are_the_whole(name):
    case = case_named(ATTENTION, name)
    arrays = native.draw(ATTENTION, case, torch.float32, "cpu")
    whole, upstream = native.run(
        ATTENTION, case, {k: t.double() if t.is_floating_point() else t for k, t in arrays.items()}, plain=True
    )
    group = case.shapes["query"][1] // case.shapes["key"][1]
    parts = native.parts(ATTENTION, case, every=True)
    assert len(parts) == math.prod(case.shapes["key"][:2])
    for part in parts:
        some = {k: native.of_part(k, t, part, group) for k, t in arrays.items()}
        dy = tuple(native.of_part("output", t, part, group) for t in upstream)
        for result, t in native.truth(ATTENTION, case, some, dy, torch.float64).items():
            torch.testing.assert_close(t, native.of_part(result, whole[result], part, group), rtol=1e-9, atol=1e-12)


def test_of_attention_some_groups_are_judged_and_all_must_be_numbers():
    case = case_named(ATTENTION, "mask_of_all")
    arrays = native.draw(ATTENTION, case, torch.bfloat16, "cpu")
    got, upstream = native.run(ATTENTION, case, arrays, plain=True)

    def failed():
        rows = native.judge(ATTENTION, case, torch.bfloat16, arrays, upstream, got)
        return {row.tensor: row.reason for row in rows if not row.passed}

    assert native.parts(ATTENTION, case) == [(0, 0), (1, 0), (1, 1)] and failed() == {}
    got["value"][0, 1, 3] = math.nan
    assert failed() == {"value": "an element of another part is no number"}
    got["value"][0, 1, 3], got["query"][1, 0, 5] = 0.0, 9.0
    assert list(failed()) == ["query"], "the worst of the parts is the verdict"


def test_where_pytorch_has_no_number_its_error_is_no_excuse(monkeypatch):
    """It has none, for example, for queries that see no key, on some of its paths."""
    case = case_named("linear", "no_activation")
    arrays = native.draw("linear", case, torch.bfloat16, "cpu")
    got, upstream = native.run("linear", case, arrays, plain=True)
    right = native.run

    def without_numbers(*arguments, **options):
        results, dy = right(*arguments, **options)
        broken = {name: t * math.nan if t.dtype == torch.bfloat16 else t for name, t in results.items()}
        return broken, dy

    monkeypatch.setattr(native, "run", without_numbers)
    rows = native.judge("linear", case, torch.bfloat16, arrays, upstream, got)
    assert all(row.passed and row.plain_error is None and row.budget > 0 for row in rows), rows
    got["weight"] *= 1.1
    rows = native.judge("linear", case, torch.bfloat16, arrays, upstream, got)
    assert [row.tensor for row in rows if not row.passed] == ["weight"]


def test_a_truth_that_does_not_fit_is_float32(monkeypatch):
    right = native.truth

    def too_large(*arguments):
        if arguments[-1] == torch.float64:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return right(*arguments)

    monkeypatch.setattr(native, "truth", too_large)
    rows = native.check("linear", case_named("linear", "no_activation"), torch.bfloat16)
    assert {row.truth for row in rows} == {"float32"} and all(row.passed for row in rows)


def test_inputs_depend_on_case_and_seed_alone():
    case = case_named("linear_cross_entropy", "ignored")
    first, again, other = (native.draw("linear_cross_entropy", case, torch.float32, "cpu", seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    assert (first["target"] == -100).any() and (first["target"] >= 0).any()


def test_layouts_are_those_of_the_case():
    case = case_named("linear", "weight_transposed")
    assert native.draw("linear", case, torch.float32, "cpu")["weight"].stride() == (1, 48)
    output = functional.linear(torch.ones(2, 4), torch.ones(3, 4))
    (dy,) = native.upstream_of((output.mT,))
    assert dy.stride() == output.mT.stride()


def test_worst_and_bits():
    nan, inf = math.nan, math.inf
    for got, want, error in (
        ([1.0, 2.0], [1.0, 2.5], 0.5),
        ([inf, nan], [inf, nan], 0.0),
        ([nan], [0.0], inf),
        ([inf], [-inf], inf),
        ([], [], 0.0),
    ):
        assert float(native.worst(torch.tensor(got), torch.tensor(want))) == error
        assert numerics.worst(np.array(got), np.array(want)) == error, "in verify"
    many = torch.zeros(5, 3)
    many[4, 2] = 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_PIECE", 4)
        assert float(native.worst(many, torch.zeros(5, 3))) == 1


def test_a_case_takes_longer_the_more_it_does():
    large, small = (
        native.seconds("linear", case_named("linear", name), torch.bfloat16) for name in ("square_8192", "square_512")
    )
    assert large > small > 0
