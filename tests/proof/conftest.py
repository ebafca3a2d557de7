import json

import pytest
from compiled_rows import run_python

from primer_fast.proof.targets import TARGETS


@pytest.fixture(scope="session")
def seen():
    """What offline_probe.py saw."""
    done = run_python("tests/proof/offline_probe.py")
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="session")
def table(tmp_path_factory):
    """Rows of `primer-fast kernels`: every production case in bfloat16 on sm_90, a few elsewhere."""
    for package in ("tyro", "rich"):
        pytest.importorskip(package, reason="`primer-fast kernels` needs primer-fast[cli]")
    cases = ("square_4096", "decode", "stem", "mnist")
    everywhere = ["--case", *cases, "--dtype", "float16", "float32", "--target", *TARGETS]
    rows = []
    for i, choice in enumerate((["--dtype", "bfloat16"], everywhere)):
        path = tmp_path_factory.mktemp("kernels") / f"{i}.json"
        no_warning = ("-W", "error::UserWarning")  # users must see none
        done = run_python(*no_warning, "-m", "primer_fast.cli", "kernels", *choice, "--json", str(path))
        assert path.exists(), done.stderr[-4000:]
        content = json.loads(path.read_text())["rows"]
        assert done.returncode == any(row["error"] is not None for row in content), done.stderr[-4000:]
        rows += content
    return rows
