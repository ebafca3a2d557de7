import json

import pytest

from primer_fast.bench import results, tables
from primer_fast.bench.report import Report, Row, load


def timed(provider="primer_fast", **figures):
    figures = {"median_ms": 2.0, "low_ms": 1.9, "high_ms": 2.1, "samples": 9} | figures
    return Row("linear", "square", "bfloat16", "forward", provider, **figures)


def a_report(**header):
    header = {
        "device": "A GPU",
        "kind": "cuda",
        "measures": "device time",
        "date": "2026-01-02T03:04:05+00:00",
        "torch": "2.13.0",
        "triton": "3.7.1",
        "python": "3.11",
        "ceilings": {"copy_gbps": 3012.3, "tflops": {"bfloat16": 790.1}, "sizes": {}},
    } | header
    target = {"what": "versus torch.compile >= 1.1", "value": 1.05, "met": False}
    rows = [
        timed(host_us=18.25, rate=641.0, unit="TFLOP/s", share=0.81, noise=0.004, targets=[target]),
        timed("torch", median_ms=2.5, low_ms=2.4, high_ms=2.6, versus={"torch.compile": 0.9}, exposed=True),
        Row("linear", "square", "bfloat16", "forward", "peer", status="failed", reason="not installed: a|b"),
    ]
    return Report(header, rows, ["linear odd, tf32, forward"])


def test_round_trip(tmp_path):
    path = tmp_path / "new" / "folder" / "bench.json"
    a_report().save(path)
    assert load(path) == a_report()
    assert [p.name for p in path.parent.iterdir()] == ["bench.json"]  # the temporary name is gone


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "bench.json"
    a_report().save(path)
    broken = a_report()
    broken.rows[0].median_ms = float("nan")
    with pytest.raises(ValueError):
        broken.save(path)
    assert load(path) == a_report()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema=0), "schema must be 1; got 0"),
        (lambda d: d.pop("rows"), "must have a header and rows"),
        (lambda d: d["header"].pop("ceilings"), "missing ceilings"),
        (lambda d: d["rows"][0].update(speed=1), "row 0 has unknown columns: speed"),
        (lambda d: d["rows"][1].pop("provider"), "row 1 is not a row: .*provider"),
        (lambda d: d["rows"][0].update(median_ms=None), "row 0 is ok, so it must have"),
        (lambda d: d["rows"][0].update(median_ms=-1.0), "row 0 must have 0 < low_ms"),
        (lambda d: d["rows"][0].update(high_ms=1.0), "row 0 must have 0 < low_ms"),
        (lambda d: d["rows"][0].update(status="fine"), "row 0 must have a status of"),
        (lambda d: d["rows"][2].update(reason=""), "row 2 is failed, so it must say why"),
    ],
)
def test_load_refuses(tmp_path, change, message):
    path = tmp_path / "bench.json"
    a_report().save(path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message) as refused:
        load(path)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("content", ["", '{"schema": 1, "rows": [', "[1, 2]"])
def test_load_refuses_what_is_no_report(tmp_path, content):
    path = tmp_path / "bench.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"bench\.json"):
        load(path)


def test_what_is_committed_can_be_read():
    assert results.read().unreadable == {}


def test_text_says_all_of_it():
    page = tables.text(a_report())
    for expected in [
        "A GPU",
        "copy 3012 GB/s; products in TFLOP/s: bfloat16 790.1",
        "linear square, bfloat16, forward (noise 0.4%)",
        "2.500*",
        "641 TFLOP/s",
        "81.0%",
        "peer: failed, not timed: not installed: a|b",
        "at most 0.4% apart",
        "MISSED: linear square bfloat16 forward: versus torch.compile >= 1.1, is 1.05",
        "left out for want of time:\n  linear odd, tf32, forward",
    ]:
        assert expected in page


def test_columns_are_aligned_and_empty_ones_left_out():
    heading, first, second = tables.group_text(a_report().rows).splitlines()[1:4]
    assert len(heading) == len(first) == len(second)
    assert "peak MiB" not in heading
    assert "host us" in heading


def test_markdown_rows_have_the_columns_of_the_heading():
    lines = [line for line in tables.markdown(a_report()).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 3
    assert {line.replace("\\|", "").count("|") for line in lines} == {lines[0].count("|")}


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "-"), (0.0, "0"), (0.01234, "0.0123"), (9.999, "10.00"), (12.34, "12.3"), (4321.0, "4321")],
)
def test_number(value, shown):
    assert tables.number(value, 3) == shown
