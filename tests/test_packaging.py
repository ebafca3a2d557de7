"""What the archives hold that `pip wheel` and a build of the source archive make."""

import email
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools")
ROOT = Path(__file__).parent.parent
BUILD = """
from setuptools import build_meta
print(build_meta.prepare_metadata_for_build_wheel("made"), build_meta.build_sdist("made"), sep="\\n")
"""


@pytest.fixture(scope="module")
def tracked():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def made(tracked, tmp_path_factory):
    """The folder with the metadata and the source archive, made in a copy: a build leaves files beside the sources."""
    copy = tmp_path_factory.mktemp("copy")
    for name in tracked:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, copy / name)
    (copy / "made").mkdir()
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    metadata, archive = (copy / "made" / name for name in done.stdout.split("\n")[-3:-1])
    return metadata, archive


def test_the_metadata_says_what_an_index_shows(made):
    found = email.message_from_string((made[0] / "METADATA").read_text(encoding="utf-8"))
    assert found["Summary"] and found["Requires-Python"] == ">=3.10"
    assert found["License"] == "Apache-2.0" and found["License-File"] == "LICENSE"
    assert found["Description-Content-Type"] == "text/markdown"
    assert found.get_payload().strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    classifiers = found.get_all("Classifier")
    assert "Programming Language :: Python :: 3" in classifiers and "Typing :: Typed" in classifiers


def test_the_source_archive_can_be_tested_from(made, tracked):
    """It holds all that a clone does: tests, docs, benchmarks and their results, constraints.txt, Makefile."""
    with tarfile.open(made[1]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {name for name in tracked if name not in held} <= {".ci/run", ".gitignore"}
