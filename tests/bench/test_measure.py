import math
from dataclasses import replace

import pytest
import torch

from primer_fast.bench import __main__ as command
from primer_fast.bench import ceilings, environment, measure, units
from primer_fast.bench import op as ops
from primer_fast.bench.__main__ import main, run
from primer_fast.bench.agenda import planned
from primer_fast.bench.ceilings import Ceilings
from primer_fast.bench.measure import Group, measure_group, prepared, relative_error
from primer_fast.bench.op import EAGER, FORWARD, FORWARD_BACKWARD, OURS, Floor, Op, OpGoal, Precision
from primer_fast.bench.report import FAST, OpRow, Report, load
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


def measured(pass_name=FORWARD_BACKWARD, precision="float32", op=None, **providers):
    group = Group(op or tiny_op(**providers), CASE, precision, pass_name, "cpu")
    rows = measure_group(group, WallClock(), LIMITS, 0.001, with_compile=False)
    return {row.provider: row for row in rows}


class TestRows:
    @pytest.mark.parametrize("pass_name", [FORWARD, FORWARD_BACKWARD])
    def test_all_providers_are_timed(self, pass_name):
        rows = measured(pass_name)
        assert list(rows) == [OURS, EAGER, "product"]
        for row in rows.values():
            assert row.status == "ok"
            assert 0 < row.low_ms <= row.median_ms <= row.high_ms
            assert row.samples >= 7
        assert rows[OURS].error == 0
        assert rows["product"].error is None  # it computes something else
        assert rows[OURS].noise >= 0
        assert rows[OURS].versus.keys() == {EAGER, "product"}

    def test_rate_and_share_follow_from_the_work(self):
        row = measured(FORWARD)[OURS]
        assert row.unit == "GB/s"  # 272 bytes at 10 GB/s take longer than 192 operations at 1 TFLOP/s
        assert row.rate == pytest.approx(272 / row.median_ms / 1e6)
        assert row.share == pytest.approx(row.rate / 10)

    def test_backward_adds_its_work(self):
        row = measured(FORWARD_BACKWARD)[OURS]
        assert row.rate == pytest.approx((272 + 400) / row.median_ms / 1e6)

    def test_a_part_is_the_gradient_of_one_array(self):
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
        rows = measured("forward+dweight", op=op)
        assert list(rows) == [OURS, EAGER, "other"] and all(row.status == "ok" for row in rows.values())
        assert set(asked) == {(False, True)}
        assert rows[OURS].rate == pytest.approx((272 + 128) / rows[OURS].median_ms / 1e6)


class TestWrongProviders:
    def check(self, function, pass_name=FORWARD_BACKWARD, provider="other"):
        calls = []

        def counted(input, weight):
            calls.append(1)
            return function(input, weight)

        row = measured(pass_name, **{provider: counted})[provider]
        assert row.median_ms is None
        assert row.samples == 0
        assert len(calls) == 1  # compared, never timed
        return row

    def test_wrong_values(self):
        row = self.check(lambda input, weight: 1.001 * plain(input, weight), FORWARD)
        assert row.status == "wrong"
        assert row.error == pytest.approx(1e-3, rel=1e-2)
        assert "relative error 1.0" in row.reason

    def test_wrong_gradient_behind_right_values(self):
        class Halved(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, g):
                return g / 2

        row = self.check(lambda input, weight: plain(input, Halved.apply(weight)))
        assert row.status == "wrong"
        assert row.error == pytest.approx(0.5, rel=1e-3)

    @pytest.mark.parametrize(
        "function",
        [
            lambda input, weight: plain(input, weight) * math.nan,
            lambda input, weight: plain(input, weight).double(),
            lambda input, weight: plain(input, weight)[:1],
            lambda input, weight: (plain(input, weight), plain(input, weight)),
        ],
        ids=["nan", "dtype", "shape", "count"],
    )
    def test_never_passes(self, function):
        assert self.check(function, FORWARD).status == "wrong"

    def test_a_right_answer_left_in_memory_is_not_found_by_the_next(self):
        given = []

        def kept(input, weight):
            given.append(plain(input, weight))
            return given[-1]

        measured(FORWARD, kept=kept)
        assert given[0].isnan().all()  # the compared result
        assert not given[1].isnan().any()

    def test_inputs_given_back_as_outputs_survive(self):
        op = Op(
            **vars(tiny_op()) | {"providers": {OURS: lambda input, weight: input, EAGER: lambda input, weight: input}}
        )
        assert {row.status for row in measured(FORWARD, op=op).values()} == {"ok"}

    def test_one_that_raises_says_why(self):
        def absent(input, weight):
            import a_package_that_nobody_has  # noqa: F401

        def broken(input, weight):
            raise RuntimeError("first line\nsecond line")

        rows = measured(absent=absent, broken=broken)
        assert rows["absent"].reason == "not installed: No module named 'a_package_that_nobody_has'"
        assert rows["broken"].reason == "RuntimeError: first line"
        assert rows[OURS].status == "ok"

    def test_one_that_raises_while_timed(self):
        calls = []

        def tired(input, weight):
            calls.append(1)
            if len(calls) > 3:
                raise RuntimeError("no more")
            return plain(input, weight)

        rows = measured(FORWARD, tired=tired)
        assert (rows["tired"].status, rows["tired"].reason) == ("failed", "RuntimeError: no more")
        assert rows[OURS].status == "ok"

    def test_without_eager_nothing_can_be_compared(self):
        def broken(input, weight):
            raise MemoryError("too large")

        rows = measured(**{EAGER: broken})
        assert rows[OURS].status == "failed"
        assert "nothing to compare with: torch: MemoryError: too large" in rows[OURS].reason
        assert rows["product"].status == "ok"

    def test_prepared_refuses_the_same(self):
        group = Group(tiny_op(wrong=lambda input, weight: -plain(input, weight)), CASE, "float32", FORWARD, "cpu")
        assert prepared(group, "wrong")[1]["status"] == "wrong"
        call, failure = prepared(group, OURS)
        assert not failure
        assert call()[0].shape == (8, 3)


def test_relative_error_is_the_worst_of_the_tensors():
    one = torch.ones(4)
    assert relative_error((one, 1.5 * one), (one, one)) == pytest.approx(0.5)
    assert relative_error((one,), (torch.zeros(4),)) == pytest.approx(2.0)  # nothing to be relative to
    assert math.isnan(relative_error((one * math.nan, one), (one, one)))


def test_upstream_gradients_are_random_and_the_same_for_all():
    seen = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            seen.append(g.clone())
            return g

    def watched(input, weight):
        return Watched.apply(plain(input, weight))

    measured(one=watched, two=watched)
    assert all(torch.equal(g, seen[0]) for g in seen)
    assert seen[0].std() > 0.1


class TestTargets:
    def row(self, **versus):
        return OpRow(
            "tiny", "tiny", "float32", FORWARD, OURS, median_ms=1, low_ms=1, high_ms=1, host_us=20, versus=versus
        )

    def found(self, target, row, pass_name=FORWARD, precision="float32"):
        op = replace(tiny_op(), goals=[target])
        return measure.targets(Group(op, CASE, precision, pass_name, "cuda"), row)

    def test_bounds(self):
        row = self.row(torch=1.2)
        assert self.found(OpGoal("versus torch", at_least=1.1), row)[0]["met"]
        missed = self.found(OpGoal("versus torch", at_least=1.3), row)
        ratio = pytest.approx(1.2 / 1.3)
        assert missed == [{"what": "versus torch >= 1.3", "value": 1.2, "met": False, "ratio": ratio}]
        host = self.found(OpGoal("host_us", at_most=25), row)
        assert host == [{"what": "host_us <= 25", "value": 20, "met": True, "ratio": 1.25}]

    def test_asked_only_where_it_applies(self):
        row = self.row(torch=1.2)
        assert not self.found(OpGoal("versus somebody", at_least=1), row)
        assert not self.found(OpGoal("versus torch", at_least=1, passes=[FORWARD_BACKWARD]), row)
        assert not self.found(OpGoal("versus torch", at_least=1, precisions=["bfloat16"]), row)
        assert not self.found(OpGoal("versus torch", at_least=1, where=lambda case: False), row)


def test_what_is_compiled_beforehand_has_the_precision_of_the_measurement():
    """Inductor keeps what it compiles by that."""
    seen = []

    def watched(**arrays):
        seen.append(precision())
        return plain(**arrays)

    before = precision()
    prepared(Group(tiny_op(peer=watched), CASE, "tf32", FORWARD, "cpu"), "peer")
    assert set(seen) == {"high"} and precision() == before


def precision():
    return torch.get_float32_matmul_precision()


def test_the_host_is_timed_where_its_time_says_something(monkeypatch):
    clock = WallClock()
    monkeypatch.setattr(clock, "host_us", lambda function: 7.0)
    for limit, host_us in ((0.0, None), (1e9, 7.0)):
        monkeypatch.setattr(measure, "HOST_MS", limit)
        group = Group(tiny_op(), CASE, "float32", FORWARD, "cpu")
        rows = measure_group(group, clock, LIMITS, 0.001, with_compile=False)
        assert {row.host_us for row in rows if row.status == "ok"} == {host_us}


class TestRun:
    def groups(self):
        return planned([tiny_op()], ["bfloat16", "float32"], [FORWARD, FORWARD_BACKWARD], "cpu")

    def test_the_most_important_come_first(self):
        assert [(g.precision, g.pass_name) for g in self.groups()] == [
            ("bfloat16", FORWARD),
            ("bfloat16", FORWARD_BACKWARD),
            ("float32", FORWARD),
            ("float32", FORWARD_BACKWARD),
        ]

    def test_budget_stops_before_a_group_that_would_not_fit(self):
        clock = iter([0.0, 0.0, 4.0, 4.0, 8.0, 8.0, 8.0]).__next__  # begin, then start and end of each group: 4 s
        report, seen = Report(FAST, {}), []
        run(self.groups(), lambda g: [g.row(OURS, status="failed", reason="a test")], report, 10, seen.append, clock)
        assert len(report.rows) == len(seen) == 2
        assert report.left_out == ["tiny tiny, float32, forward", "tiny tiny, float32, forward+backward"]

    def test_without_a_budget_all_are_measured(self):
        report = Report(FAST, {})
        run(self.groups(), lambda g: [g.row(OURS, status="failed", reason="a test")], report)
        assert len(report.rows) == 4
        assert not report.left_out

    def test_a_broken_declaration_is_a_row(self):
        report = Report(FAST, {})
        run(self.groups(), lambda g: 1 // 0, report)
        assert {row.reason for row in report.rows} == {"ZeroDivisionError: integer division or modulo by zero"}

    def test_a_lost_gpu_ends_the_run(self):
        def lost(group):
            raise units.DeviceLost("AcceleratorError: illegal memory access")

        report, seen = Report(FAST, {}), []
        with pytest.raises(units.DeviceLost):
            run(self.groups(), lost, report, None, seen.append)
        assert len(report.rows) == len(seen) == 1
        assert report.rows[0].reason == "the GPU was lost: AcceleratorError: illegal memory access"
        assert len(report.left_out) == 3

    def test_the_next_process_goes_on_behind_what_was_tried(self):
        report, measured = Report(FAST, {}), []

        def fails(group):
            measured.append(str(group))
            return [group.row(OURS, status="failed", reason="a test")]

        run(self.groups()[:2], fails, report)
        run(self.groups(), fails, report)
        assert measured == [str(group) for group in self.groups()]
        assert len(report.rows) == 4 and not report.left_out


def test_arrays_are_random_and_weights_scaled_by_fan_in():
    case = Case("c", "", {"input": (64, 256), "weight": (128, 256), "bias": (128,)})
    arrays = ops.random_arrays("linear", case, torch.float32, "cpu", torch.Generator().manual_seed(0))
    assert arrays["input"].std() == pytest.approx(1, rel=0.05)
    assert arrays["weight"].std() == pytest.approx(1 / 16, rel=0.05)
    assert arrays["bias"].std() == pytest.approx(1, rel=0.3)


def test_ceilings_are_measured_and_bound_the_time():
    found = ceilings.measure("cpu", ["float32"], WallClock(), 0.001, {"copy": 1 << 16, "float32": 32})
    assert 1e-5 < found.copy_gbps < 1e5
    assert 1e-7 < found.tflops["float32"] < 1e3
    assert found.sizes == {"copy": 1 << 16, "float32": 32}
    limits = Ceilings(copy_gbps=2.0, tflops={"float32": 0.5}, sizes={})
    assert limits.floor_ms(1e9, 1e6, "float32") == (2.0, "TFLOP/s")
    assert limits.floor_ms(1e6, 1e6, "float32") == (0.5, "GB/s")


def test_matmul_precision_is_put_back():
    before = torch.get_float32_matmul_precision()
    with pytest.raises(KeyError), ceilings.matmul_precision(Precision(torch.float32, "high", 1)):
        assert torch.get_float32_matmul_precision() == "high"
        raise KeyError
    assert torch.get_float32_matmul_precision() == before


def test_unknown_op():
    with pytest.raises(ValueError, match=r"op must be one of .*linear.*; got 'nothing'"):
        ops.load("nothing")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's header and case list")
def test_command_on_the_cpu(monkeypatch, capsys, tmp_path):
    linear = ops.load("linear")
    smallest = replace(linear, cpu_cases=[case for case in linear.cpu_cases if case.name == "primer"])
    monkeypatch.setattr(ops, "load", {"linear": smallest}.get)
    path = tmp_path / "bench.json"
    assert main([*quick_command(monkeypatch), "--pass", "forward", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "wall time of the CPU path" in printed
    assert "linear primer, float32, forward (noise" in printed
    found = load(path)
    assert {row.provider for row in found.rows if row.status == "ok"} == {OURS, EAGER, "torch.mm"}
    assert {row.status for row in found.rows} <= {"ok", "not available"}


def quick_command(monkeypatch):
    monkeypatch.setattr("primer_fast.backend.interpreting", False)
    monkeypatch.setattr("primer_fast.backend.stand_in", None)
    monkeypatch.setattr(ceilings, "measure", lambda *_, **__: LIMITS)
    monkeypatch.setattr(environment, "commit", lambda: None)  # which git takes long to tell
    return ["linear", "--quick", "--dtype", "float32", "--no-compile", "--seconds-per-row", "0.001"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's case list")
def test_an_interrupted_command_keeps_what_it_measured(monkeypatch, tmp_path):
    groups = []

    def interrupted(group, *_, **__):
        groups.append(group)
        if len(groups) == 2:
            raise KeyboardInterrupt
        return [group.row(OURS, status="failed", reason="a test")]

    monkeypatch.setattr(command, "measure_group", interrupted)
    path = tmp_path / "bench.json"
    assert main([*quick_command(monkeypatch), "--json", str(path)]) == 1
    found = load(path)
    assert [row.group for row in found.rows] == [("linear", "digits", "float32", FORWARD)]
    assert found.left_out[0] == "linear digits, float32, forward+backward"
    assert len(found.left_out) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's case list")
def test_another_run_is_not_gone_on_with(monkeypatch, tmp_path, capsys):
    groups = []

    def measured(group, *_, **__):
        groups.append(group)
        return [group.row(OURS, status="failed", reason="a test")]

    monkeypatch.setattr(command, "measure_group", measured)
    path = tmp_path / "bench.json"
    arguments = [*quick_command(monkeypatch), "--json", str(path), "--resume"]
    assert main(arguments) == main(arguments) == 1 and len(groups) == 4
    assert "not resumed" not in capsys.readouterr().err
    found = load(path)
    found.header["source"] = "another"
    found.save(path)
    assert main(arguments) == 1 and len(groups) == 8 and len(load(path).rows) == 4
    assert "not resumed" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's case list")
def test_an_op_that_cannot_be_imported_is_a_row(monkeypatch, capsys):
    def broken(name):
        raise SyntaxError("a test")

    monkeypatch.setattr(ops, "load", broken)
    assert main(quick_command(monkeypatch)) == 1
    assert "linear all, all, all" in (printed := capsys.readouterr().out)
    assert "cannot be imported: SyntaxError: a test" in printed


def test_command_refuses_the_interpreter(monkeypatch, capsys):
    monkeypatch.setattr("primer_fast.backend.interpreting", True)
    assert main(["linear"]) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err


def test_command_refuses_an_unknown_op(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["nothing"])
    assert exit_.value.code == 2
    assert "no benchmark named nothing" in capsys.readouterr().err


@pytest.mark.parametrize("name", ops.names())
def test_arrays_are_those_of_the_case(name):
    """On any device, and without memory, as where what is launched with them is compiled."""
    op = ops.load(name)
    case = op.cpu_cases[-1]
    for device, generator in (("cpu", torch.Generator().manual_seed(0)), ("meta", None)):
        arrays = op.arrays(case, torch.bfloat16, device, generator)
        assert {array: tuple(t.shape) for array, t in arrays.items()} == case.shapes
        assert {str(t.dtype)[6:] for array, t in arrays.items() if array in case.dtypes} == {*case.dtypes.values()}
        assert all(t.dtype == torch.bfloat16 for array, t in arrays.items() if array not in case.dtypes)
