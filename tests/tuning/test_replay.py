"""A choice's launches, taken from a run of the op and made again; here in the interpreter, on small cases."""

import time

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from primer_fast.bench.timing import WallClock
from primer_fast.kernels.device import chip
from primer_fast.kernels.product import MatmulSettings
from primer_fast.kernels.tunable import watching
from primer_fast.tuning import session
from primer_fast.tuning.problems import Decision, TunedCase, arrays_of, run, units
from primer_fast.tuning.replay import Wrong, launches_of

UNIT = TunedCase("linear", "primer", "float32")
SMALL = MatmulSettings(64, 32, 32, 4, 2)
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the small cases are the CPU's")


@pytest.fixture
def decisions(device):
    """The problems of settings that the small case comes to: the forward's, then the backward's."""
    met = []

    def watch(choice, gpu, problem):
        met.append(Decision(UNIT, choice.name, problem))
        return choice.chosen(gpu, problem)

    with watching(watch):
        run(UNIT, arrays_of(UNIT, "cpu"))
    return [decision for decision in met if not decision.variants]


@pytest.fixture
def launched(monkeypatch):
    """The arguments of each launch by their names."""
    made, usual = [], InterpretedFunction.run

    def run(self, *args, **options):
        made.append(dict(zip(self.arg_names, args, strict=False)) | options)
        return usual(self, *args, **options)

    monkeypatch.setattr(InterpretedFunction, "run", run)
    return made


def tile(launch):
    return launch["BLOCK_M"], launch["BLOCK_N"], launch["BLOCK_K"]


def test_launches_are_made_again_with_the_settings(decisions, launched):
    again, got = launches_of(decisions[0], SMALL, arrays_of(UNIT, "cpu"))
    assert len(decisions) == 3 and len(launched) == 3, "the whole op runs once"
    again()
    assert len(launched) == 4 and tile(launched[-1]) == SMALL[:3], "of which one launch is the choice's"
    want = got[0].clone()
    got[0].fill_(float("nan"))
    again()
    assert torch.equal(got[0], want)


def test_the_rest_of_the_op_keeps_its_settings(decisions, launched):
    """The backward's problem is tried; the forward's launch is not made again."""
    again, _ = launches_of(decisions[1], SMALL, arrays_of(UNIT, "cpu"))
    assert [tile(launch) == SMALL[:3] for launch in launched] == [False, True, False]
    again()
    assert len(launched) == 4 and tile(launched[-1]) == SMALL[:3]


def test_results_are_compared_with_the_defaults(decisions):
    arrays = arrays_of(UNIT, "cpu")
    _, want = launches_of(decisions[0], None, arrays)
    launches_of(decisions[0], SMALL, arrays, want)
    for wrong in (want[1] * 1.01, want[1] * float("nan")):
        with pytest.raises(Wrong, match="result 1 is off"):
            launches_of(decisions[0], SMALL, arrays, (want[0], wrong, *want[2:]))


def test_a_problem_that_is_not_met_is_an_error(decisions):
    other = decisions[0]._replace(problem=decisions[0].problem._replace(M=77))
    with pytest.raises(RuntimeError, match="nothing was launched"):
        launches_of(other, SMALL, arrays_of(UNIT, "cpu"))


def test_a_problem_is_timed_from_end_to_end(decisions):
    """By the wall, in the interpreter."""
    default = decisions[0].space.choice.default(chip(), decisions[0].problem)
    found = session.time_decision(decisions[0], [default, SMALL], WallClock(), time.monotonic() + 60, time.monotonic)
    assert found.settings in (default, SMALL) and 0 < found.seconds <= found.default_seconds


def test_candidates_that_are_wrong_are_not_timed(decisions, monkeypatch):
    """The launcher is made to compute something else with the other settings, and to be fast at it."""
    default = decisions[0].space.choice.default(chip(), decisions[0].problem)
    true_run = session.launches_of.__globals__["run"]

    def wrong_run(unit, arrays):
        results = true_run(unit, arrays)
        return results if not tried else tuple(r * 2 for r in results)

    tried = []
    monkeypatch.setitem(session.launches_of.__globals__, "run", wrong_run)
    made = session.launches_of

    def launches(decision, settings, *rest):
        tried.extend([settings] if settings != default else [])
        return made(decision, settings, *rest)

    monkeypatch.setattr(session, "launches_of", launches)
    clocked = []

    class Clock:
        def sampler(self, function):
            clocked.append(function)
            return lambda: 1.0

    found = session.time_decision(decisions[0], [default, SMALL], Clock(), time.monotonic() + 60, time.monotonic)
    assert found.settings == default and len(clocked) == 1 and tried == [SMALL]


def test_units_come_in_order_of_importance():
    every = units()
    first = every[: len({unit.op for unit in every})]
    assert len({unit.op for unit in first}) == len(first), "the first case of every op before the second of any"
    assert {unit.precision for unit in every[: len(every) // 2]} == {"bfloat16"}
    assert [unit.case for unit in units(["linear"], ["tf32"])][:2] == ["square_4096", "square_8192"]
