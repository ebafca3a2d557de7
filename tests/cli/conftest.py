import os
import shutil

import pytest
from cli import commands

from primer_fast.cli import main


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    """A folder with data of every kind, and with ``base``, a small transformer."""
    folder = tmp_path_factory.mktemp("base")
    with commands.base_in(folder):
        return folder


@pytest.fixture
def folder(base_folder, monkeypatch, plain_path):
    """``base_folder`` as the current one; what a test makes in it goes, but for the runs that ``whole`` keeps."""
    monkeypatch.chdir(base_folder)
    monkeypatch.syspath_prepend(str(base_folder))
    before = set(os.listdir())
    yield base_folder
    os.chdir(base_folder)
    for name in set(os.listdir()) - before:
        if os.path.isfile(name):
            os.unlink(name)
        elif not name.startswith("whole-"):
            shutil.rmtree(name)


@pytest.fixture
def undrawn(monkeypatch):
    """No pictures are drawn."""
    commands.without_pictures(monkeypatch.setattr)


@pytest.fixture
def refused(capsys):
    """``refused(call)``: the one line that a call ends with, which is wrong; -> the line."""

    def refused(call, status=2):
        capsys.readouterr()
        assert main(call.split() if isinstance(call, str) else call) == status
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and "Traceback" not in message, message
        return message

    return refused
