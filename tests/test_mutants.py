"""The list of planted faults fits the files that it would change."""

from mutants import MUTANTS, ROOT


def test_every_fault_can_be_planted():
    for mutant in MUTANTS:
        assert mutant.right in (ROOT / mutant.file).read_text(encoding="utf-8"), mutant
        assert all((ROOT / a).exists() for a in mutant.tests if "/" in a), mutant
