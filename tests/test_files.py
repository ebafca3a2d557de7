"""Files are replaced whole or not at all."""

import os

import pytest

from primer_fast.files import replace_file, replace_files


def test_the_new_content_is_there_and_nothing_else(tmp_path):
    (tmp_path / "a").write_text("old")
    replace_files({tmp_path / "a": "neu: ä", tmp_path / "b": b"\0\1"})
    replace_file(str(tmp_path / "c"), "c", suffix=".part")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {
        "a": "neu: ä".encode(), "b": b"\0\1", "c": b"c"
    }  # fmt: skip


def test_where_one_cannot_be_written_all_stay(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(FileNotFoundError):
        replace_files({tmp_path / "a": "new", tmp_path / "missing" / "b": "new"})
    assert [file.name for file in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"


def test_all_is_on_the_disk_before_a_name_changes(tmp_path, monkeypatch):
    did, sync, rename = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (did.append("sync"), sync(fd)))
    monkeypatch.setattr(os, "replace", lambda old, new: (did.append("rename"), rename(old, new)))
    replace_files({tmp_path / "a": "1", tmp_path / "b": "2"})
    assert did[:4] == ["sync", "sync", "rename", "rename"]
