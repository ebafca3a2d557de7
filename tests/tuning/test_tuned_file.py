"""What the search writes, the launchers read; nothing that stood there is lost."""

import json

import pytest

from primer_fast.kernels.device import CHIPS
from primer_fast.kernels.product import MatmulSettings, Product, matmul_choice
from primer_fast.tuning import tuned_file
from primer_fast.tuning.problems import Decision, TunedCase
from primer_fast.tuning.search import Fastest

H100 = CHIPS["sm_90"]
PRODUCT = Product(1024, 1024, 4096, 2, descriptors=True)
DECISION = Decision(TunedCase("linear", "square_1024", "bfloat16"), "matmul", PRODUCT)
MINE = MatmulSettings(64, 64, 32, 4, 3)
DEFAULT = matmul_choice.default(H100, PRODUCT)
FASTER = tuned_file.entry(Fastest(MINE, 1.23456789e-4, 2e-4, 0.01), DEFAULT)


def test_what_is_written_is_what_the_launcher_chooses(tuned):
    path = tuned(H100, {})
    tuned_file.add(path, H100.name, DECISION, FASTER)
    content = json.loads(path.read_text())
    assert content["settings"]["matmul"][DECISION.bucket] == MINE._asdict() | {
        "seconds": 1.235e-4,
        "default_seconds": 2e-4,
    }
    assert content["gpu"] == "h100" and set(content) == {"gpu", "date", "torch", "triton", "settings"}
    from primer_fast.kernels.tunable import forget_tuned

    forget_tuned()
    assert matmul_choice(H100, PRODUCT) == MINE


def test_a_default_that_won_is_written_without_settings():
    assert tuned_file.entry(Fastest(DEFAULT, 1e-4, 1e-4, 0.0), DEFAULT) == {"seconds": 1e-4, "default_seconds": 1e-4}


def test_entries_are_merged(tuned):
    other = {"fft": {"8": {"RADIX": 4}}, "matmul": {"8x8x8 item2": {"seconds": 1.0, "default_seconds": 1.0}}}
    path = tuned(H100, other)
    tuned_file.add(path, H100.name, DECISION, FASTER)
    tuned_file.add(path, H100.name, DECISION._replace(problem=PRODUCT._replace(M=64)), FASTER)
    sections = json.loads(path.read_text())["settings"]
    assert sections["fft"] == other["fft"] and len(sections["matmul"]) == 3
    assert sections["matmul"]["8x8x8 item2"] == other["matmul"]["8x8x8 item2"]


def test_a_failed_write_leaves_the_file_as_it_was(tuned, monkeypatch):
    path = tuned(H100, {"matmul": {}})
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
    with pytest.raises(OSError, match="full"):
        tuned_file.add(path, H100.name, DECISION, FASTER)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path], "no temporary file stays"


def test_a_file_that_cannot_be_read_is_kept_under_another_name(tuned):
    path = tuned(H100, '{"settings": {')
    tuned_file.add(path, H100.name, DECISION, FASTER)
    assert (path.parent / "h100.json.broken").read_text() == '{"settings": {'
    assert list(json.loads(path.read_text())["settings"]) == ["matmul"]


def test_a_folder_that_is_not_there_is_made(tmp_path):
    path = tmp_path / "new" / "tuned" / "h100.json"
    tuned_file.add(path, H100.name, DECISION, FASTER)
    assert tuned_file.load(path) == {"matmul": {DECISION.bucket: FASTER}}
