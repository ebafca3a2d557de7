import pytest
import torch

from primer_fast.bench.op import OURS
from primer_fast.bench.peers import NotAvailable
from primer_fast.bench.programs.training_steps import COMPARED, compare_steps
from primer_fast.bench.report import PROGRAMS, Goal, Report

LOSSES = [3.0, 2.0, 1.5, 1.25, 1.2, 1.1]


def program(losses=LOSSES, work=20_000, log=None):
    """Makes a program whose steps lose ``losses``, and take about ``work`` additions each."""

    def make():
        taken = 0

        def step():
            nonlocal taken
            torch.arange(work).sum()
            taken += 1
            if log is not None:
                log.append(taken)
            return torch.tensor(losses[min(taken, len(losses)) - 1])

        return step

    return make


def raced(peer, ours=None, **options):
    options = {"work": 10, "unit": "tokens", "seconds": 0.001, "device": "cpu"} | options
    found = compare_steps("n", "s", {OURS: ours or program(), "peer": peer}, **options)
    return {row.provider: row for row in found}


def raises(error):
    def make():
        raise error

    return make


def test_where_ours_fails_there_is_nothing_to_compare(plain_path):
    with pytest.raises(RuntimeError, match="a loss of ours is no number"):
        raced(program(), program([float("nan")]))
    with pytest.raises(ValueError, match="broken"):
        raced(program(), raises(ValueError("broken")))


def test_a_loss_that_becomes_no_number_while_it_is_timed_is_wrong_and_can_be_written(plain_path, tmp_path):
    found = raced(peer=program([*LOSSES[:COMPARED], float("nan")]), goals={"peer": Goal(">= 0", at_least=0)})
    assert found["peer"].status == "wrong" and found["peer"].reason == "a loss is no number"
    assert found["peer"].loss is None and found["peer"].loss_difference is None and not found["peer"].targets
    assert found[OURS].status == "ok"
    Report(PROGRAMS, {}, list(found.values())).save(tmp_path / "trials.json")


def test_programs_of_equal_losses_are_timed(plain_path):
    found = raced(peer=program(work=2_000_000), goals={"peer": Goal(">= 2", at_least=2)})
    ours, peer = found[OURS], found["peer"]
    assert list(found) == [OURS, "peer"] and ours.status == peer.status == "ok"
    assert ours.versus == 1 and peer.versus > 2 and peer.targets[0]["met"] is True
    assert peer.samples == ours.samples >= 7 and peer.rate == pytest.approx(10 / peer.median_ms * 1e3)
    assert peer.loss == ours.loss == pytest.approx(1.1) and peer.loss_difference == 0 and ours.loss_difference is None


def test_one_that_learns_something_else_is_never_timed(plain_path):
    log = []
    row = raced(peer=program([*LOSSES[:3], 1.2501], log=log), tolerance=1e-5)["peer"]
    assert row.status == "wrong" and "0.0001 apart" in row.reason and row.median_ms is None
    assert len(log) == COMPARED
    assert raced(peer=program([*LOSSES[:3], 1.2501, *LOSSES[4:]]), tolerance=1e-3)["peer"].status == "ok"
    row = raced(peer=program([float("nan")]))["peer"]
    assert row.status == "wrong" and "nan apart" in row.reason and row.median_ms is None


def test_a_difference_that_comes_later_is_reported(plain_path):
    assert raced(peer=program([*LOSSES[:5], 1.35]))["peer"].loss_difference == pytest.approx(0.25)


def test_one_that_cannot_run_says_why(plain_path):
    found = raced(raises(NotAvailable("no such GPU")))
    assert (found["peer"].status, found["peer"].reason) == ("not available", "no such GPU")
    assert found[OURS].status == "ok"


def test_one_that_fails_while_timed_says_why(plain_path):
    def make():
        calls = []

        def step():
            calls.append(1)
            if len(calls) > COMPARED + 2:
                raise MemoryError("no more")
            return torch.tensor(LOSSES[len(calls) - 1])

        return step

    row = raced(peer=make)["peer"]
    assert (row.status, row.reason) == ("failed", "MemoryError: no more") and row.median_ms is None
