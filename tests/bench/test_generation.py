import pytest

from primer_fast.bench import generation
from primer_fast.bench.op import OURS

SMALL = generation.Texts(1, 2, 16, 24, 20, 3, 6, (2,), 3)


def test_equal_texts_are_timed_and_others_are_wrong(plain_path, monkeypatch):
    found = {row.provider: row for row in generation.compare(SMALL, "cpu")}
    assert list(found)[:2] == [OURS, generation.NO_CACHE] and {row.status for row in found.values()} == {"ok"}
    assert found[OURS].versus == 1 and found[OURS].rate == pytest.approx(12 / found[OURS].median_ms * 1e3)
    (target,) = found[generation.NO_CACHE].targets
    assert target["value"] == found[generation.NO_CACHE].versus and target["met"] == (target["value"] >= 3)
    whole = generation.generate

    def other(*arguments, **options):
        return whole(*arguments, **options | ({"temperature": 5} if "cache" in options else {}))

    monkeypatch.setattr(generation, "generate", other)
    wrong = {row.provider: row for row in generation.compare(SMALL, "cpu")}[generation.NO_CACHE]
    assert wrong.status == "wrong" and wrong.median_ms is None and wrong.targets == []
