"""The checks that need a GPU, as far as they run without one: what they compare, and that they see a difference."""

import threading

import pytest
import torch

from primer_fast import functional
from primer_fast.bench.stages import rehearsal
from primer_fast.functional.linear import linear_plain
from primer_fast.proof import native, on_gpu, verify
from primer_fast.proof.inputs import LAYOUTS
from primer_fast.reference.case import Case

CASE = Case("none", "no op's", {})


def compared(got, want):
    (row,) = on_gpu.compared("bitwise", "linear", CASE, torch.float32, [({"output": got}, {"output": want})])
    return row


def test_one_bit_is_a_difference():
    want = torch.tensor([1.0, 0.0, torch.nan])
    assert compared(want.clone(), want).passed
    for i, value in ((0, 1 + 2**-23), (1, -0.0), (2, 0.0)):
        got = want.clone()
        got[i] = value
        row = compared(got, want)
        assert row.passed is False and row.reason == "1 elements differ"
    assert compared(want.bfloat16(), want).passed is False and compared(want[:2], want).passed is False
    last = [torch.zeros(4), torch.zeros(4), torch.ones(4)]
    pairs = [({"output": got}, {"output": torch.zeros(4)}) for got in last]
    (row,) = on_gpu.compared("bitwise", "linear", CASE, torch.float32, pairs)
    assert row.passed is False and row.error == 1.0


def test_every_layout_is_tried_and_weights_are_not_expanded():
    cases = {op: on_gpu.layout_cases(op) for op in verify.ops()}
    assert {layout for of_op in cases.values() for case in of_op for layout in case.layouts.values()} == set(LAYOUTS)
    assert {case.name.split()[-1] for case in cases["conv2d"]} == set(LAYOUTS)
    expanded = [
        name for of_op in cases.values() for case in of_op for name, lay in case.layouts.items() if lay == "expanded"
    ]
    assert {"input", "query", "key", "value"} <= set(expanded) and "weight" not in expanded


def test_threads_agree(monkeypatch):
    rows = on_gpu.threads("linear", on_gpu.usual_case("linear", small=True), torch.bfloat16)
    assert [row.tensor for row in rows] == ["output", "input", "weight", "bias"]
    assert all(row.passed for row in rows), rows


def test_threads_that_do_not_agree_are_seen(monkeypatch):
    main = threading.current_thread()

    def linear(*args, **options):
        y = linear_plain(*args, **options)
        return y if threading.current_thread() is main else y + 1

    monkeypatch.setattr(functional, "linear", linear)
    rows = on_gpu.threads("linear", on_gpu.usual_case("linear", small=True), torch.float32)
    assert rows[0].tensor == "output" and rows[0].passed is False


def test_two_runs_that_differ_are_seen(monkeypatch):
    monkeypatch.setattr(functional, "linear", lambda *args, **options: linear_plain(*args, **options) + torch.rand(()))
    rows = on_gpu.bitwise("linear", on_gpu.usual_case("linear", small=True), torch.float32)
    assert rows[0].passed is False and rows[0].budget == 0


@pytest.mark.parametrize("op", verify.ops())
def test_large_cases_are_of_production_size(op):
    assert on_gpu.usual_case(op).production and not on_gpu.usual_case(op, small=True).production


@pytest.fixture
def stand_in():
    """torch.cuda as in a rehearsal."""
    with rehearsal.stand_in():
        yield


@pytest.mark.parametrize("check", [on_gpu.graph, on_gpu.streams])
@pytest.mark.parametrize("op", ["layer_norm", "embedding"])
def test_graphs_and_streams_agree(check, op, stand_in):
    rows = check(op, on_gpu.usual_case(op, small=True), torch.bfloat16)
    assert len(rows) >= 3 and all(row.passed for row in rows), rows


def test_a_graph_that_is_not_replayed_is_seen(stand_in, monkeypatch):
    monkeypatch.setattr(rehearsal._Graph, "replay", lambda _: None)
    rows = on_gpu.graph("layer_norm", on_gpu.usual_case("layer_norm", small=True), torch.bfloat16)
    assert not any(row.passed for row in rows)


def test_inputs_of_another_stream_are_seen(stand_in, monkeypatch):
    """An op that looked at its inputs before the stream had written them."""
    case = on_gpu.usual_case("linear", small=True)
    late = native.draw("linear", case, torch.float32, "cpu", seed=2)["input"]
    calls = []

    def linear(input, weight, bias, activation):
        calls.append(input)
        early = input if len(calls) < 4 else input + (late - input).detach()
        return linear_plain(early, weight, bias, activation=activation)

    monkeypatch.setattr(functional, "linear", linear)
    failed = {row.tensor for row in on_gpu.streams("linear", case, torch.float32) if not row.passed}
    assert len(calls) == 4 and "output" in failed


def test_there_is_no_second_gpu(stand_in, monkeypatch):
    assert on_gpu.no_second_gpu() == "there is one GPU"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert on_gpu.no_second_gpu() == ""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"GPU {number}")
    assert on_gpu.no_second_gpu() == "there are two kinds of GPU: GPU 0 and GPU 1"
