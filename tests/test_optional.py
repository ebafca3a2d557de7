"""Tests that need a package that is not installed are skipped, and nothing else is."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.fixture
def rule(request):
    """tests/conftest.py."""
    return next(p for p in request.config.pluginmanager.get_plugins() if hasattr(p, "missing_package"))


def caused_by(cause):
    error = RuntimeError("while importing a file of tests")
    error.__cause__ = cause
    return error


def test_only_an_optional_package_that_is_missing_counts(rule, monkeypatch):
    absent = ModuleNotFoundError("", name="tyro.conf")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert rule.missing_package(absent) == rule.missing_package(caused_by(absent)) == "tyro"
    for error in (ModuleNotFoundError("", name="numpy"), ImportError("", name="tyro"), RuntimeError(), None):
        assert rule.missing_package(error) is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert rule.missing_package(absent) is None, "it is installed: a test that hides it must not be skipped"


def test_files_and_tests_are_skipped_with_the_reason(rule, tmp_path):
    absent = [name for name in sorted(rule.OPTIONAL) if importlib.util.find_spec(name) is None]
    if not absent:
        pytest.skip("every optional package is installed")
    (tmp_path / "test_file.py").write_text(f"import {absent[0]}\n\ndef test_never(): pass\n")
    (tmp_path / "test_single.py").write_text(
        f"def test_skipped(): import {absent[0]}\n\ndef test_failed(): import a_package_that_nobody_has\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", "-rs", str(tmp_path)]
    kept = os.environ | {"PYTHONPATH": str(TESTS)}
    done = subprocess.run(command, cwd=tmp_path, env=kept, capture_output=True, text=True)
    assert f"{absent[0]} is not installed" in done.stdout
    assert "1 failed, 2 skipped" in done.stdout
