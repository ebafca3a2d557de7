"""Signals that ask a run to end, and what is left of it."""

import os
import signal
import sys
import types

import pytest
from cli.commands import CALLS, at_step, saved_step

from primer_fast import cli
from primer_fast.cli import interruption
from primer_fast.cli.interruption import Ending, Interruption, Stopped


@pytest.fixture
def stopped(folder, undrawn):
    """``stopped(*signals)``: the status of a run that gets these in step 6."""

    def call(*numbers):
        with at_step(6, lambda: [signal.raise_signal(number) for number in numbers]):
            return cli.main(CALLS["mlp"].argv("run"))

    return call


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_leaves_the_checkpoint_of_its_step(name, status, stopped, capsys):
    """Twice, as `timeout` sends it: the second is a copy."""
    number = getattr(signal, name)
    before = signal.getsignal(number)
    assert stopped(number, number) == status
    assert saved_step("run") == 6 and signal.getsignal(number) is before
    said = capsys.readouterr()
    assert "stopping after this step; a second signal quits at once" in said.out and said.err == ""


def test_a_second_signal_ends_at_once(stopped, monkeypatch, capsys):
    monkeypatch.setattr(interruption, "COPIES", 0.0)
    assert stopped(signal.SIGTERM, signal.SIGTERM) == 143
    assert saved_step("run") == 4 and capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_ctrl_c_after_another_signal_ends_at_once(first, stopped, capsys):
    assert stopped(first, signal.SIGINT) == 130
    assert saved_step("run") == 4 and capsys.readouterr().err == "interrupted\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


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
