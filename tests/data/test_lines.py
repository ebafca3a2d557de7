import json

import pytest

from primer_fast.data.lines import number_of, read_lines, read_objects
from primer_fast.data.preferences import Preference, read_preferences, read_ratings, write_preferences
from primer_fast.data.prompts import read_prompts


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("last", [True, False])
def test_line_ends_and_the_byte_order_mark(end, last, tmp_path):
    file = tmp_path / "lines"
    file.write_bytes(("\ufeffa" + end + end + "b" + (end if last else "")).encode())
    assert read_lines(file) == ["a", "", "b"]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_what_else_looks_like_a_line_end_stands_in_a_text(mark, tmp_path):
    pair = Preference("a" + mark + "b", "c" + mark, mark + "d")
    write_preferences(tmp_path / "pairs.jsonl", [pair])
    assert read_preferences(tmp_path / "pairs.jsonl") == [pair]
    (tmp_path / "ratings.tsv").write_text(f"mean_rating\ttext\n1\ta{mark}b\n", encoding="utf-8", newline="")
    assert [t.text for t in read_ratings(tmp_path / "ratings.tsv")] == [f"a{mark}b"]
    (tmp_path / "prompts.txt").write_text(f"a{mark}b\nc\n", encoding="utf-8", newline="")
    assert read_prompts(tmp_path / "prompts.txt") == [f"a{mark}b", "c"]


def test_empty_lines_count(tmp_path):
    (tmp_path / "rows.jsonl").write_text('\n{"a": 1}\n  \n{"a": 2}\n')
    assert list(read_objects(tmp_path / "rows.jsonl")) == [(2, {"a": 1}), (4, {"a": 2})]


def test_whole_characters_written_as_two_halves(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"a": "😀"}))
    assert "\\ud83d\\ude00" in (tmp_path / "rows.jsonl").read_text()
    assert list(read_objects(tmp_path / "rows.jsonl")) == [(1, {"a": "😀"})]


def test_long_fields(tmp_path):
    (tmp_path / "ratings.tsv").write_text("text\tmean_rating\n" + "a" * 200_000 + "\t1\n")
    assert len(read_ratings(tmp_path / "ratings.tsv")[0].text) == 200_000


NUMBERS = {
    "1": 1,
    "-1.5": -1.5,
    "+2": 2,
    ".5": 0.5,
    "3.": 3,
    "2e-3": 0.002,
    "1E2": 100,
    " 7 ": 7,
    "1e38": 1e38,
    "-0": 0,
}
NO_NUMBERS = [
    "1_0", "1_000.5", "1e1_0", "\u0661\u0662", "\uff11\uff10", "nan", "inf", "-Infinity", "1e39", "-1e400",
    "0x10", "1,5", "1 0", "", " ", ".", "e5", "1e", "--1", "\t1", "1\u2028",
]  # fmt: skip


def test_numbers_are_what_people_write_as_one():
    assert {text: number_of(text) for text in NUMBERS} == NUMBERS
    assert [text for text in NO_NUMBERS if number_of(text) is not None] == []
