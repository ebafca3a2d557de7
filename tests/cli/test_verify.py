import json

import pytest

pytest.importorskip("tyro", reason="the command line needs primer-fast[cli]")
pytest.importorskip("rich", reason="the command line needs primer-fast[cli]")

from primer_fast import functional
from primer_fast.cli import main


def test_a_table_and_a_file(tmp_path, capsys):
    path = tmp_path / "rows.json"
    arguments = ["verify", "linear", "--dtype", "float32", "bfloat16", "--case", "one", "primer_last"]
    assert main([*arguments, "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    for word in ("linear", "primer_last", "bfloat16", "pointers", "descriptors", "PyTorch's error", "0 not"):
        assert word in printed
    rows = json.loads(path.read_text())["rows"]
    assert {row["case"] for row in rows} == {"one", "primer_last"} and all(row["passed"] for row in rows)


def test_every_tensor(capsys):
    assert main(["verify", "linear", "--dtype", "float32", "--case", "one", "--tensors"]) == 0
    assert "weight alone" in capsys.readouterr().out


def test_a_failure_is_named_and_exits_with_1(monkeypatch, capsys):
    right = functional.linear
    monkeypatch.setattr(functional, "linear", lambda *args, **options: 1.5 * right(*args, **options))
    assert main(["verify", "linear", "--dtype", "float16", "--case", "one"]) == 1
    assert "0 within budget, 8 not" in capsys.readouterr().out
