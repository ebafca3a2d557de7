"""What the documents say of the code."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted((ROOT / "docs").glob("*.md"))
WITH_README = [ROOT / "README.md", *DOCUMENTS]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_tests_that_are_named_exist(document):
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(test_\w+))?`", document.read_text())
    assert named
    for path, test in named:
        assert f"def {test}" in (ROOT / path).read_text(), f"{path} has no {test}"


@pytest.mark.parametrize("document", WITH_README, ids=lambda path: path.name)
def test_the_names_that_are_named_exist(document):
    for name in re.findall(r"`(primer_fast(?:\.\w+)+)`", document.read_text()):
        parts = name.split(".")
        for end in range(len(parts), 0, -1):
            try:
                found = importlib.import_module(".".join(parts[:end]))
            except ModuleNotFoundError:
                continue
            break
        for part in parts[end:]:
            assert hasattr(found, part), f"{document.name} names {name}"
            found = getattr(found, part)


@pytest.mark.parametrize("document", WITH_README, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", document.read_text()):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"
