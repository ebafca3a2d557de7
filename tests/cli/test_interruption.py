"""Signals that ask a run to end, and what is left of it."""

import json
import os
import signal
import sys
import types

import pytest

from primer_fast import cli
from primer_fast.cli import interruption, train_mlp
from primer_fast.cli.interruption import Ending, Interruption, Stopped
from primer_fast.cli.run_folder import RunFolder, read_safetensors

SOCCER = ["--data", "soccer", "--out", "run", "--epochs", "100", "--log-every", "5"]


@pytest.fixture
def soccer(tmp_path, monkeypatch, plain_path):
    """``soccer(*signals)``: the status of a run that gets these in step 50."""
    monkeypatch.chdir(tmp_path)
    log = RunFolder.log

    def call(*numbers):
        def raising(self, row):
            log(self, row)
            if row["step"] == 50:
                for number in numbers:
                    signal.raise_signal(number)

        monkeypatch.setattr(RunFolder, "log", raising)
        return train_mlp.main(SOCCER)

    return call


def saved_step():
    return json.loads(read_safetensors("run/checkpoint.safetensors")[1]["progress"])["step"]


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_leaves_the_checkpoint_of_its_step(name, status, soccer, capsys):
    """Twice, as `timeout` sends it: the second is a copy."""
    number = getattr(signal, name)
    before = signal.getsignal(number)
    assert soccer(number, number) == status
    assert saved_step() == 50 and signal.getsignal(number) is before
    said = capsys.readouterr()
    assert "stopping after this step; a second signal quits at once" in said.out and said.err == ""
    assert "go on with: primer-fast train mlp --data soccer --out run" in said.out


def test_a_second_signal_ends_at_once(soccer, monkeypatch, capsys):
    monkeypatch.setattr(interruption, "COPIES", 0.0)
    assert soccer(signal.SIGTERM, signal.SIGTERM) == 143
    assert saved_step() == 45 and capsys.readouterr().err == "interrupted\n"


def test_a_second_kind_of_signal_ends_at_once(soccer, capsys):
    assert soccer(signal.SIGTERM, signal.SIGINT) == 130
    assert saved_step() == 45


def test_copies_of_torchrun_are_one_request(monkeypatch):
    """It hands SIGINT on to processes that may have had it already, later than any copy comes elsewhere."""
    clock = iter([0.0, 4.9, 5.0])
    monkeypatch.setattr(interruption.time, "monotonic", lambda: next(clock))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with Interruption(print) as asked:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert asked.requested()
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGINT)


def test_a_message_that_cannot_be_shown_is_none(monkeypatch):
    def notify(text):
        raise OSError(5, "Input/output error")

    with Interruption(notify) as asked:
        signal.raise_signal(signal.SIGTERM)
    assert asked.requested() and interruption.status(asked.stop()) == 143


def test_an_ignored_hang_up_stays_ignored():
    """`nohup` asks for that."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Ending(), Interruption(print) as asked:
            signal.raise_signal(signal.SIGHUP)
        assert not asked.requested()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_every_command_ends_by_a_signal_with_its_status(name, status, monkeypatch, capsys):
    number = getattr(signal, name)
    fake = types.ModuleType("primer_fast.cli.verify")
    fake.main = lambda argv: signal.raise_signal(number)
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    assert cli.main(["verify"]) == status
    assert capsys.readouterr().err == "interrupted\n"


def test_one_of_several_processes_is_killed_where_it_cannot_save(monkeypatch):
    """It may wait for another one that is gone, where no exception reaches it."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = signal.getsignal(signal.SIGTERM)
    with Ending():
        assert signal.getsignal(signal.SIGTERM) is before


def test_a_forked_process_does_not_answer_for_its_parent():
    with Interruption(print) as asked:
        child = os.fork()
        if child == 0:
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGTERM and not asked.requested()
