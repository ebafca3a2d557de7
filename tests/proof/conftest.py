import json

import pytest
import triton
from compiled_rows import TABLE, run_python


@pytest.fixture(scope="session")
def compiled():
    """What compile_probe.py compiled: everything of this folder, but for test_prepared.py."""
    whole = [] if committed()["triton"] == triton.__version__ else ["whole"]
    # A warning is an error: users must not see any
    done = run_python("-W", "error::UserWarning", "tests/proof/compile_probe.py", TABLE, *whole)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="session")
def seen(compiled):
    """What offline() did with small kernels."""
    return compiled["small"]


@pytest.fixture(scope="session")
def table(compiled):
    """Rows of `primer-fast kernels`: every production case in bfloat16 on sm_90, a few with other dtypes and targets.

    What is not compiled anew is read from the committed table, which test_production.py compares with these rows.
    """
    for package in ("tyro", "rich"):
        pytest.importorskip(package, reason="`primer-fast kernels` needs primer-fast[cli]")
    rows = []
    for row, known in zip(compiled["production"], committed()["rows"], strict=False):
        rows.append(row if row["resources"] or row["error"] else known)
    return rows + compiled["elsewhere"]


def committed():
    return json.loads(TABLE.read_text())
