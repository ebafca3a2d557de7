import json
import math

import pytest

from primer_fast.bench import trial
from primer_fast.bench.trial import Goal, Trial, TrialReport


def timed(provider="primer_fast", seconds=(2.0, 1.0, 3.0), ours=(1.0, 1.0, 1.0), **figures):
    made = Trial("nanogpt", "small", provider, unit="tokens", **figures)
    made.time(seconds, ours, 500)
    return made


def a_report(*trials, kind="cpu", date="2026-01-02T03:04:05+00:00", **header):
    header = {
        "device": "A CPU", "kind": kind, "date": date, "command": "python -m primer_fast.bench.cpu", "torch": "2.13.0",
        "python": "3.11", "load_before": 0.25, "details": "2 threads", "commit": "abc",
    } | header  # fmt: skip
    return TrialReport(header, list(trials))


def test_figures_are_those_of_the_turns():
    found = timed("nanoGPT", seconds=(2.0, 1.0, 4.0), ours=(1.0, 1.0, 1.0))
    assert (found.low_ms, found.median_ms, found.high_ms) == (1500, 2000, 3000)
    assert found.samples == 3 and found.rate == 250
    assert (found.versus_low, found.versus, found.versus_high) == (1.5, 2, 3)
    slow_spell = timed("nanoGPT", seconds=(2.0, 20.0, 2.0), ours=(1.0, 10.0, 1.0))
    assert slow_spell.versus == 2, "a slow spell of both cancels"


@pytest.mark.parametrize(
    ("goal", "value", "met"),
    [(Goal("", at_least=1.3), 1.3, True), (Goal("", at_least=1.3), 1.29, False), (Goal("", at_most=5), 5.1, False),
     (Goal("", at_most=5), -2, True), (Goal("", at_least=1), math.nan, False)],
)  # fmt: skip
def test_a_goal_is_judged(goal, value, met):
    assert goal.judged(value)["met"] is met


def test_round_trip(tmp_path):
    path = tmp_path / "new" / "trials.json"
    report = a_report(
        timed(), timed("peer", targets=[Goal("x", 1).judged(2.0)]), Trial("ppo", "all", "TRL", "failed", "y")
    )
    report.save(path)
    assert trial.load(path) == report
    assert [p.name for p in path.parent.iterdir()] == ["trials.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "trials.json"
    a_report(timed()).save(path)
    with pytest.raises(ValueError):
        a_report(timed(peak_mib=math.nan)).save(path)
    assert trial.load(path) == a_report(timed())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema=1), "schema must be 'trials 1'; got 1"),
        (lambda d: d.pop("trials"), "must have a header and trials"),
        (lambda d: d["header"].pop("command"), "missing command"),
        (lambda d: d["trials"][0].update(speed=1), "trial 0 has unknown columns: speed"),
        (lambda d: d["trials"][0].pop("provider"), "trial 0 is not a trial: .*provider"),
        (lambda d: d["trials"][0].update(median_ms=None), "trial 0 is ok, so it must have"),
        (lambda d: d["trials"][0].update(high_ms=0.1), "trial 0 is ok, so it must have"),
        (lambda d: d["trials"][1].update(status="fine"), "trial 1 must have a status"),
        (lambda d: d["trials"][1].update(reason=""), "trial 1 is failed, so it must say why"),
        (lambda d: d["trials"][0].update(targets=[{"what": "x"}]), "trial 0 has a target that is not"),
    ],
)
def test_load_refuses(tmp_path, change, message):
    path = tmp_path / "trials.json"
    a_report(timed(), Trial("ppo", "all", "TRL", "failed", "y")).save(path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message) as refused:
        trial.load(path)
    assert str(path) in str(refused.value)
    path.write_text("{")
    with pytest.raises(ValueError, match="must be JSON"):
        trial.load(path)


def test_lines_say_all_of_it():
    missed = timed("nanoGPT", seconds=(1.2,) * 3, loss=3.25, loss_difference=5e-7, peak_mib=33.25)
    missed.targets.append(Goal(">= 1.3 x", at_least=1.3).judged(missed.versus))
    text = "\n".join(trial.lines([timed(), missed, Trial("nanogpt", "small", "TRL", "not available", "no such thing")]))
    for expected in [
        "nanogpt: small",
        "2000 ms (1500 to 2500)",
        "250 tokens/s",
        "1.2 x our time",
        "peak 33.2 MiB",
        "loss 3.25",
        "5.0e-07 apart",
        "[MISSED: >= 1.3 x, is 1.2]",
        "not available: no such thing",
    ]:
        assert expected in text


def test_what_was_left_out_is_kept_and_older_files_have_none(tmp_path):
    path = tmp_path / "trials.json"
    report = a_report(timed())
    report.left_out = ["ppo"]
    report.save(path)
    assert trial.load(path).left_out == ["ppo"]
    data = json.loads(path.read_text())
    del data["left_out"]
    assert trial.parse(data, path).left_out == []
    with pytest.raises(ValueError, match="left_out must be names; got 3"):
        trial.parse(data | {"left_out": 3}, path)
