import re

import pytest

from primer_fast.bench import generation
from primer_fast.bench.op import OURS
from primer_fast.bench.trial import Goal

SMALL = ["--layers", "1", "--heads", "2", "--width", "16", "--context", "24", "--vocab", "20", "--prompt", "3"]


def test_rates_are_printed_and_tokens_are_equal(plain_path, capsys):
    generation.main([*SMALL, "--new-tokens", "6", "--rounds", "2", "--batch", "1", "3", "--device", "cpu"])
    printed = capsys.readouterr().out
    rows = re.findall(r"^  (cache|no cache|transformers) +(\d+) +([\d.]+) x +(\w+)", printed, re.MULTILINE)
    assert [row[0] for row in rows][:2] == ["cache", "no cache"] and len(rows) in (4, 6)
    for name, rate, faster, tokens in rows:
        assert float(rate) > 0 and float(faster) > 0 and tokens == "equal"
        assert name != "cache" or float(faster) == 1


def test_a_missed_target_is_an_exit_code(plain_path, monkeypatch, capsys):
    arguments = [*SMALL, "--new-tokens", "4", "--rounds", "1", "--batch", "1", "--device", "cpu"]
    monkeypatch.setattr(generation, "AT_LEAST", {generation.NO_CACHE: Goal("", at_least=1e9)})
    assert generation.main(arguments) == 1
    monkeypatch.setattr(generation, "AT_LEAST", {generation.NO_CACHE: Goal("", at_least=0)})
    assert generation.main(arguments) == 0


def test_as_trials(plain_path, monkeypatch):
    arguments = [*SMALL, "--new-tokens", "6", "--rounds", "3", "--batch", "2", "--device", "cpu"]
    found = {trial.provider: trial for trial in generation.trials(arguments)}
    assert list(found)[:2] == [OURS, generation.NO_CACHE] and {t.status for t in found.values()} == {"ok"}
    assert found[OURS].versus == 1 and found[OURS].rate == pytest.approx(12 / found[OURS].median_ms * 1e3)
    (target,) = found[generation.NO_CACHE].targets
    assert target["value"] == found[generation.NO_CACHE].versus and target["met"] == (target["value"] >= 3)
    whole = generation.generate

    def other(*arguments, **options):
        return whole(*arguments, **options | ({"temperature": 5} if "cache" in options else {}))

    monkeypatch.setattr(generation, "generate", other)
    wrong = {trial.provider: trial for trial in generation.trials(arguments)}[generation.NO_CACHE]
    assert wrong.status == "wrong" and wrong.median_ms is None and wrong.targets == []
