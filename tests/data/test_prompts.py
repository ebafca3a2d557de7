import json

import pytest

from primer_fast.data.prompts import read_completions, read_prompts


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_completions_and_chosen_ones(tmp_path):
    rows = [{"prompt": "a", "completion": " b"}, {"prompt": "", "chosen": "c", "rejected": "d"}]
    assert read_completions(write(tmp_path / "a.jsonl", rows)) == [("a", " b"), ("", "c")]


def test_prompts_of_lines_and_of_objects(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo two\none\n")
    assert read_prompts(tmp_path / "a.txt") == ["one", "two two"]
    rows = [{"prompt": "x", "other": 1}, {"prompt": ""}]
    assert read_prompts(write(tmp_path / "a.jsonl", rows)) == ["x", ""]


@pytest.mark.parametrize("name", ["a.JSONL", "a.JsonL", "a.ndjson", "a.NDJSON", "a.json", "a.Json"])
def test_the_name_of_a_file_of_objects_may_be_in_capitals(tmp_path, name):
    assert read_prompts(write(tmp_path / name, [{"prompt": "x"}, {"prompt": "y"}])) == ["x", "y"]


@pytest.mark.parametrize("name", ["a.txt", "a", "a.jsonl.bak"])
def test_objects_are_no_prompts_themselves(tmp_path, name):
    with pytest.raises(ValueError, match=r"must be in a file that ends in \.json or \.jsonl or \.ndjson"):
        read_prompts(write(tmp_path / name, [{"prompt": "x"}]))
    (tmp_path / name).write_text('{"other": 1}\n{prompt\n["prompt"]\n')  # lines as any other
    assert read_prompts(tmp_path / name) == ['{"other": 1}', "{prompt", '["prompt"]']


BAD = {
    "no completion": ('{"prompt": "a"}', "line 2: completion is missing; got prompt"),
    "number": ('{"prompt": 3, "completion": "b"}', "line 2: prompt must be a string; got int"),
    "no prompt": ('{"completion": "b"}', "line 2: prompt must be a string; got none"),
    "empty": ('{"prompt": "a", "completion": ""}', "line 2: completion must not be empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_lines_are_named(tmp_path, case):
    line, message = BAD[case]
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl, ") as error:
        read_completions(path)
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_nothing_in_a_file(tmp_path, name):
    (tmp_path / name).write_text("\n")
    with pytest.raises(ValueError, match="must hold at least one"):
        read_prompts(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_prompts(tmp_path / "nowhere.txt")
