"""What is left of the candidates before any is timed."""

import pytest
from tuning.problems import PROBLEMS

from primer_fast.kernels.device import CHIPS
from primer_fast.kernels.product import MatmulSettings, Product, matmul_choice
from primer_fast.kernels.tunable import Variant
from primer_fast.tuning import prune
from primer_fast.tuning.problems import Decision, TunedCase
from primer_fast.tuning.prune import Compiled, by_compile, by_estimate
from primer_fast.tuning.registry import SPACES

H100, A100 = CHIPS["sm_90"], CHIPS["sm_80"]
UNIT = TunedCase("linear", "square_4096", "bfloat16")
SQUARE = Product(4096, 4096, 4096, 2, descriptors=True)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda c: c.arch)
@pytest.mark.parametrize("name", SPACES)
def test_the_default_comes_first_and_all_fit(name, chip):
    problem, mine = PROBLEMS[name]
    if chip is A100 and getattr(problem, "descriptors", False):
        problem = problem._replace(descriptors=False)
    decision, choice = Decision(UNIT, name, problem), SPACES[name].choice
    pruned = prune.prune(decision, chip)
    if decision.variants:
        fitting = {Variant(name) for name, fits in choice.ways.items() if fits(chip, problem)}
        assert set(pruned.estimated) == fitting and pruned.estimated[0] == choice.default(chip, problem)
        return
    assert pruned.estimated[0] == choice.default(chip, problem)
    assert choice.fits(chip, problem, pruned.estimated[0]), (
        "the rule of what fits must not be stricter than the default"
    )
    assert 3 <= len(pruned.estimated) <= prune.MOST and len(set(pruned.estimated)) == len(pruned.estimated)
    assert all(choice.fits(chip, problem, s) for s in pruned.estimated)
    assert len(pruned.estimated) <= pruned.legal <= pruned.candidates
    times = [SPACES[name].estimate(chip, problem, s) for s in pruned.estimated]
    assert all(0 < t < 1 for t in times) and max(times[1:]) <= prune.FACTOR * min(times)
    if name not in ("logits_statistics", "logits_gradient"):  # their settings hold fields that they do not use
        assert mine in set(SPACES[name].candidates(chip, problem)) or choice.fits(chip, problem, mine)


def test_shared_memory_is_respected():
    """128 x 256 in steps of 64 bfloat16: a stage is (128 + 256) 64 2 = 49152 bytes, and 3072 are kept for the rest.

    An H100 program may have 232448 bytes: 4 stages, not 5. An A100's 166912 hold 3.
    """
    tile = MatmulSettings(128, 256, 64, 8, 4)
    assert matmul_choice.fits(H100, SQUARE, tile)
    assert not matmul_choice.fits(H100, SQUARE, tile._replace(num_stages=5))
    small = H100._replace(shared=166912)
    assert matmul_choice.fits(small, SQUARE, tile._replace(num_stages=3))
    assert not matmul_choice.fits(small, SQUARE, tile)
    limit = H100._replace(shared=3072 + 4 * 49152)
    assert matmul_choice.fits(limit, SQUARE, tile)
    assert not matmul_choice.fits(limit._replace(shared=limit.shared - 1), SQUARE, tile)


def test_registers_are_respected():
    """128 x 256 accumulators are 128 a thread with 8 warps, 256 with 4: more than there are."""
    assert matmul_choice.fits(H100, SQUARE, MatmulSettings(128, 256, 64, 8, 3))
    assert not matmul_choice.fits(H100, SQUARE, MatmulSettings(128, 256, 64, 4, 3))


def test_the_estimate_prefers_what_is_known_to_be_fast():
    """cuBLAS and CUTLASS take 128 x 256 for large squares; no tile of 16 columns is within reach of it."""
    kept = prune.prune(Decision(UNIT, "matmul", SQUARE._replace(M=8192, N=8192, K=8192)), H100).estimated
    assert kept[0][:2] == (128, 256) and all(s.BLOCK_M * s.BLOCK_N >= 64 * 128 for s in kept)


def settings(*blocks):
    return [MatmulSettings(*block, 32, 4, 3) for block in blocks]


def test_by_estimate_keeps_the_default_however_slow():
    default, fast, near, slow = settings((16, 16), (128, 128), (64, 128), (64, 64))
    seconds = {default: 9.0, slow: 1.6, near: 1.4, fast: 1.0}
    assert by_estimate(seconds, default, 1.5, 10) == [default, fast, near]
    assert by_estimate(seconds, default, 1.5, 2) == [default, fast]
    assert by_estimate(seconds, default, 2.0, 10) == [default, fast, near, slow]


def test_by_estimate_leaves_room_for_other_shapes():
    (default, other), large = settings((64, 64), (64, 128)), settings((128, 128))[0]
    alike = [large._replace(num_stages=n) for n in range(2, 9)]
    seconds = {default: 2.0, other: 1.2} | dict.fromkeys(alike, 1.0)
    kept = by_estimate(seconds, default, 1.5, 10)
    assert kept[0] == default and other in kept and sum(s[:2] == (128, 128) for s in kept) == 3
    assert kept[1] == large, "of equals, the one with most in common with the default"


def test_by_compile_drops_what_fails_spills_or_is_launched_twice():
    default, a, b, c, d, e = settings((16, 16), (32, 32), (64, 64), (128, 64), (64, 128), (128, 128))
    compiled = [
        Compiled(a, "PTXASError"),
        Compiled(b, spill_bytes=104, code="b"),
        Compiled(default, spill_bytes=8, code="default"),
        Compiled(c, spill_bytes=16, code="c"),
        Compiled(d, shared=232449, code="d"),
        Compiled(e, shared=232448, code="c"),
    ]
    assert by_compile(compiled, default, 232448) == [default, c]
    spilling = [row._replace(spill_bytes=120) if row.settings == default else row for row in compiled]
    assert by_compile(spilling, default, 232448) == [default, b, c], (
        "what spills no more than the default may be faster"
    )
    assert by_compile([Compiled(default, "failed"), compiled[3]], default, 232448) == [default, c]
