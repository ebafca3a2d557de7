import pytest
import torch

from primer_fast.bench import memory

pytestmark = pytest.mark.skipif(memory.begin("cpu") is None, reason="the system does not say how much memory was used")
MIB = 2**20


def test_the_peak_is_what_was_there_at_once(plain_path):
    def in_turn():
        for _ in range(3):
            torch.ones(64 * MIB // 4).sum()

    def at_once():
        return [torch.ones(64 * MIB // 4) for _ in range(3)]

    for function, mib in ((in_turn, 64), (at_once, 192), (lambda: None, 0)):
        function()
        assert memory.peak_bytes(function, "cpu") / MIB == pytest.approx(mib, abs=4)


def test_many_small_pieces_count_although_their_pages_were_there_before(plain_path):
    def pieces():
        return [torch.ones(MIB // 16) for _ in range(256)]  # 64 MiB, none of them large enough for a mapping of its own

    pieces()
    for _ in range(2):
        assert memory.peak_bytes(pieces, "cpu") / MIB == pytest.approx(64, abs=4)


def test_without_a_beginning_there_is_no_end():
    assert memory.end("cpu", None) is None
