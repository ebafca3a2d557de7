"""From the declaration of an op to rows, and the command that measures them."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch

from primer_fast.bench import __main__ as command
from primer_fast.bench import ceilings, environment, measure
from primer_fast.bench import op as ops
from primer_fast.bench.__main__ import main
from primer_fast.bench.ceilings import Ceilings
from primer_fast.bench.measure import Group, measure_group, prepared, relative_error
from primer_fast.bench.op import EAGER, FORWARD, FORWARD_BACKWARD, OURS, Floor, Op, OpGoal
from primer_fast.bench.report import OpRow, load
from primer_fast.bench.timing import WallClock
from primer_fast.reference.case import Case

CASE = Case("tiny", "a test", {"input": (8, 4), "weight": (3, 4)})
LIMITS = Ceilings(10.0, {"float32": 1.0, "bfloat16": 1.0}, {})


def plain(input, weight):
    return torch.tanh(input @ weight.t())


def tiny_op(**providers):
    return Op(
        name="tiny",
        draw=lambda op, *arguments: ops.random_arrays("linear", *arguments),
        providers={OURS: plain, EAGER: plain} | providers,
        gpu_cases=[CASE],
        cpu_cases=[CASE],
        flops=lambda case: {"forward": 192, "backward": 384},
        bytes_moved=lambda case, itemsize: {"forward": 68 * itemsize, "backward": 100 * itemsize},
        floor=Floor("product", lambda input, weight: input @ weight.t(), lambda g, input, weight: (g @ weight,)),
    )


def measured(pass_name=FORWARD_BACKWARD, op=None, clock=None, **providers):
    group = Group(op or tiny_op(**providers), CASE, "float32", pass_name, "cpu")
    rows = measure_group(group, clock or WallClock(), LIMITS, 0.001, with_compile=False)
    return {row.provider: row for row in rows}


@pytest.mark.parametrize(("pass_name", "moved"), [(FORWARD, 272), (FORWARD_BACKWARD, 272 + 400)])
def test_all_providers_are_timed_and_rates_follow_from_the_work(pass_name, moved):
    rows = measured(pass_name)
    assert list(rows) == [OURS, EAGER, "product"] and {row.status for row in rows.values()} == {"ok"}
    assert all(0 < row.low_ms <= row.median_ms <= row.high_ms and row.samples >= 7 for row in rows.values())
    ours = rows[OURS]
    assert ours.error == 0 and rows["product"].error is None, "it computes something else"
    assert ours.noise >= 0 and ours.versus.keys() == {EAGER, "product"}
    assert ours.unit == "GB/s", "272 bytes at 10 GB/s take longer than 192 operations at 1 TFLOP/s"
    assert ours.rate == pytest.approx(moved / ours.median_ms / 1e6) and ours.share == pytest.approx(ours.rate / 10)


def test_a_part_is_the_gradient_of_one_array():
    """Timed without the floor, whose backward is that of all arrays."""
    asked = []

    def seen(input, weight):
        asked.append((input.requires_grad, weight.requires_grad))
        return plain(input, weight)

    op = replace(
        tiny_op(other=seen),
        parts=("weight",),
        flops=lambda case: {"forward": 192, "backward": 384, "weight": 192},
        bytes_moved=lambda case, itemsize: {"forward": 272, "backward": 400, "weight": 128},
    )
    assert op.passes() == [FORWARD, FORWARD_BACKWARD, "forward+dweight"] and op.passes([FORWARD]) == [FORWARD]
    rows = measured("forward+dweight", op)
    assert list(rows) == [OURS, EAGER, "other"] and all(row.status == "ok" for row in rows.values())
    assert set(asked) == {(False, True)}
    assert rows[OURS].rate == pytest.approx((272 + 128) / rows[OURS].median_ms / 1e6)


def passed(x, told):
    """``x``; its gradient is passed to a function, which may return another."""
    y = x.clone()
    if y.requires_grad:
        y.register_hook(told)
    return y


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (lambda input, weight: 1.001 * plain(input, weight), 1e-3),
        (lambda input, weight: plain(input, passed(weight, lambda g: g / 2)), 0.5),
        (lambda input, weight: plain(input, weight) * math.nan, None),
        (lambda input, weight: plain(input, weight).double(), None),
        (lambda input, weight: plain(input, weight)[:1], None),
        (lambda input, weight: (plain(input, weight), plain(input, weight)), None),
    ],
    ids=["values", "gradient", "nan", "dtype", "shape", "count"],
)
def test_one_that_computes_something_else_is_never_timed(function, error):
    calls = []

    def other(input, weight):
        calls.append(1)
        return function(input, weight)

    row = measured(other=other)["other"]
    assert row.status == "wrong" and row.median_ms is None and row.samples == 0 and len(calls) == 1
    assert row.error == (error and pytest.approx(error, rel=1e-2))
    group = Group(tiny_op(other=function), CASE, "float32", FORWARD_BACKWARD, "cpu")
    assert prepared(group, "other")[1]["status"] == "wrong"
    call, failure = prepared(group, OURS)
    assert not failure and call()[0].shape == (8, 3)


def test_a_right_answer_left_in_memory_is_not_found_by_the_next():
    """Results are overwritten; inputs that are given back as results are not."""
    given = []

    def kept(input, weight):
        given.append(plain(input, weight))
        return given[-1]

    measured(FORWARD, kept=kept)
    assert given[0].isnan().all() and not given[1].isnan().any()
    op = replace(tiny_op(), providers=dict.fromkeys((OURS, EAGER), lambda input, weight: input))
    assert {row.status for row in measured(FORWARD, op).values()} == {"ok"}


def test_one_that_raises_says_why():
    calls = []

    def absent(input, weight):
        import a_package_that_nobody_has  # noqa: F401

    def broken(input, weight):
        raise RuntimeError("first line\nsecond line")

    def tired(input, weight):
        calls.append(1)
        if len(calls) > 3:
            raise MemoryError("no more")
        return plain(input, weight)

    rows = measured(absent=absent, broken=broken, tired=tired)
    assert rows["absent"].status == "not available" and "a_package_that_nobody_has" in rows["absent"].reason
    assert (rows["broken"].status, rows["broken"].reason) == ("failed", "RuntimeError: first line")
    assert (rows["tired"].status, rows["tired"].reason) == ("failed", "MemoryError: no more")
    assert rows[OURS].status == "ok"
    rows = measured(**{EAGER: broken})
    assert rows[OURS].status == "failed" and "nothing to compare with: torch: RuntimeError" in rows[OURS].reason
    assert rows["product"].status == "ok"


def test_relative_error_is_the_worst_of_the_tensors():
    one = torch.ones(4)
    assert relative_error((one, 1.5 * one), (one, one)) == pytest.approx(0.5)
    assert relative_error((one,), (torch.zeros(4),)) == pytest.approx(2.0)  # nothing to be relative to
    assert math.isnan(relative_error((one * math.nan, one), (one, one)))


def test_upstream_gradients_are_random_and_the_same_for_all():
    seen = []

    def watched(input, weight):
        return passed(plain(input, weight), lambda g: seen.append(g.clone()) or g)

    measured(one=watched, two=watched)
    assert all(torch.equal(g, seen[0]) for g in seen)
    assert seen[0].std() > 0.1


def test_targets_are_asked_for_only_where_they_apply():
    row = OpRow(
        "tiny", "tiny", "float32", FORWARD, OURS, median_ms=1, low_ms=1, high_ms=1, host_us=20, versus={"torch": 1.2}
    )

    def found(*bound, **more):
        return measure.targets(Group(replace(tiny_op(), goals=[OpGoal(*bound, **more)]), CASE, *where), row)

    where = "float32", FORWARD, "cuda"
    assert found("versus torch", at_least=1.1)[0]["met"]
    missed = {"what": "versus torch >= 1.3", "value": 1.2, "met": False, "ratio": pytest.approx(1.2 / 1.3)}
    assert found("versus torch", at_least=1.3) == [missed]
    assert found("host_us", at_most=25) == [{"what": "host_us <= 25", "value": 20, "met": True, "ratio": 1.25}]
    assert not found("versus somebody", at_least=1)
    for elsewhere in ({"passes": [FORWARD_BACKWARD]}, {"precisions": ["bfloat16"]}, {"where": lambda case: False}):
        assert not found("versus torch", at_least=1, **elsewhere)


def test_what_is_compiled_beforehand_has_the_precision_of_the_measurement():
    """Inductor keeps what it compiles under that precision. The caller's precision comes back afterwards."""
    seen, precision = [], torch.get_float32_matmul_precision

    def watched(**arrays):
        seen.append(precision())
        return plain(**arrays)

    before = precision()
    prepared(Group(tiny_op(peer=watched), CASE, "tf32", FORWARD, "cpu"), "peer")
    assert set(seen) == {"high"} and precision() == before


def test_the_host_is_timed_where_its_time_says_something(monkeypatch):
    clock = WallClock()
    monkeypatch.setattr(clock, "host_us", lambda function: 7.0)
    for limit, host_us in ((0.0, None), (1e9, 7.0)):
        monkeypatch.setattr(measure, "HOST_MS", limit)
        assert {row.host_us for row in measured(FORWARD, clock=clock).values()} == {host_us}


def test_arrays_are_random_and_weights_scaled_by_fan_in():
    case = Case("c", "", {"input": (64, 256), "weight": (128, 256), "bias": (128,)})
    arrays = ops.random_arrays("linear", case, torch.float32, "cpu", torch.Generator().manual_seed(0))
    assert arrays["input"].std() == pytest.approx(1, rel=0.05)
    assert arrays["weight"].std() == pytest.approx(1 / 16, rel=0.05)
    assert arrays["bias"].std() == pytest.approx(1, rel=0.3)


@pytest.mark.parametrize("name", ops.names())
def test_arrays_are_those_of_the_case(name):
    """On any device; on "meta" they have no memory, which is enough for compiling what is launched with them."""
    op = ops.load(name)
    cases = [op.cpu_cases[-1], *(case for case in op.gpu_cases if case.name == "bert")]  # which has lengths
    for case, device in product(cases, ("cpu", "meta")):
        generator = torch.Generator().manual_seed(0) if device == "cpu" else None
        arrays = op.arrays(case, torch.bfloat16, device, generator)
        assert {array: tuple(t.shape) for array, t in arrays.items()} == case.shapes
        assert {str(t.dtype)[6:] for array, t in arrays.items() if array in case.dtypes} == {*case.dtypes.values()}
        assert all(t.dtype == torch.bfloat16 for array, t in arrays.items() if array not in case.dtypes)


def test_ceilings_are_measured_and_bound_the_time():
    found = ceilings.measure("cpu", ["float32"], WallClock(), 0.001, {"copy": 1 << 16, "float32": 32})
    assert 1e-5 < found.copy_gbps < 1e5
    assert 1e-7 < found.tflops["float32"] < 1e3
    assert found.sizes == {"copy": 1 << 16, "float32": 32}
    limits = Ceilings(copy_gbps=2.0, tflops={"float32": 0.5}, sizes={})
    assert limits.floor_ms(1e9, 1e6, "float32") == (2.0, "TFLOP/s")
    assert limits.floor_ms(1e6, 1e6, "float32") == (0.5, "GB/s")


@pytest.fixture
def on_cpu(monkeypatch):
    """Calls the command on the two first cases of linear; its exit status."""
    if torch.cuda.is_available():
        pytest.skip("the CPU's case list")
    monkeypatch.setattr("primer_fast.backend.interpreting", False)
    monkeypatch.setattr("primer_fast.backend.stand_in", None)
    monkeypatch.setattr(ceilings, "measure", lambda *_, **__: LIMITS)
    monkeypatch.setattr(environment, "commit", lambda: None)  # which git takes long to tell
    quick = ["linear", "--quick", "--dtype", "float32", "--no-compile", "--seconds-per-row", "0.001"]
    return lambda *arguments: main([*quick, *map(str, arguments)])


@pytest.fixture
def groups(monkeypatch):
    """Nothing is measured; what would be measured stands in the list."""
    tried = []

    def fails(group, *_, **__):
        tried.append(str(group))
        return [group.row(OURS, status="failed", reason="a test")]

    monkeypatch.setattr(command, "measure_group", fails)
    return tried


def test_command_on_the_cpu(on_cpu, monkeypatch, capsys, tmp_path):
    linear = ops.load("linear").with_smallest_case()
    monkeypatch.setattr(ops, "load", {"linear": linear}.get)
    path = tmp_path / "bench.json"
    assert on_cpu("--pass", "forward", "--json", path) == 0
    printed = capsys.readouterr().out
    assert "wall time of the CPU path" in printed and "linear primer, float32, forward (noise" in printed
    found = load(path)
    assert {row.provider for row in found.rows if row.status == "ok"} == {OURS, EAGER, "torch.mm"}
    assert {row.status for row in found.rows} <= {"ok", "not available"}


def test_an_interrupted_command_keeps_what_it_measured(on_cpu, groups, monkeypatch, tmp_path):
    fails = command.measure_group

    def interrupted(group, *_, **__):
        if groups:
            raise KeyboardInterrupt
        return fails(group)

    monkeypatch.setattr(command, "measure_group", interrupted)
    assert on_cpu("--json", tmp_path / "bench.json") == 1
    found = load(tmp_path / "bench.json")
    assert [row.group for row in found.rows] == [("linear", "digits", "float32", FORWARD)]
    assert found.left_out[0] == "linear digits, float32, forward+backward" and len(found.left_out) == 3


def test_another_run_is_not_gone_on_with(on_cpu, groups, tmp_path, capsys):
    path = tmp_path / "bench.json"
    assert on_cpu("--json", path, "--resume") == on_cpu("--json", path, "--resume") == 1 and len(groups) == 4
    assert "not resumed" not in capsys.readouterr().err
    found = load(path)
    assert len(found.rows) == 4 and not found.left_out
    found.header["source"], found.rows = "another", found.rows[:2]
    found.save(path)
    assert on_cpu("--json", path, "--resume") == 1 and len(groups) == 8 and len(load(path).rows) == 4
    assert "not resumed" in capsys.readouterr().err
    found.header, found.rows = load(path).header, found.rows[:2]
    found.save(path)
    assert on_cpu("--json", path, "--resume") == 1 and groups[8:] == groups[2:4], "the next process goes on"


def test_an_op_that_is_broken_is_a_row(on_cpu, monkeypatch, capsys):
    def broken(*_, **__):
        raise SyntaxError("a test")

    monkeypatch.setattr(command, "measure_group", broken)
    assert on_cpu() == 1 and "SyntaxError: a test" in capsys.readouterr().out, "its own declarations"
    monkeypatch.setattr(ops, "load", broken)
    assert on_cpu() == 1 and "cannot be imported: SyntaxError: a test" in capsys.readouterr().out


def test_wrong_calls(monkeypatch, capsys):
    monkeypatch.setattr("primer_fast.backend.interpreting", True)
    assert main(["linear"]) == 2 and "TRITON_INTERPRET" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        main(["nothing"])
    assert left.value.code == 2 and "no benchmark named nothing" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"op must be one of .*linear.*; got 'nothing'"):
        ops.load("nothing")
