import os
import subprocess
import sys

import pytest

SHOW = """
import os, sys
import primer_fast.cli
print(os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules)
"""


@pytest.mark.parametrize(
    "environment, want",
    [({}, "5000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "active"}, "None")],
    ids=str,
)
def test_the_spin_is_set_before_torch_is_imported(environment, want):
    clean = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    shown = subprocess.run([sys.executable, "-c", SHOW], env=clean | environment, capture_output=True, text=True)
    assert shown.stdout.split() == [want, "False"]
