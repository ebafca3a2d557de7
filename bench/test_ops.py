"""pytest-benchmark's table: every op, case, pass and provider; wall time, so on a GPU the launch is part of it.

For device time, noise and ceilings: python -m primer_fast.bench.
"""

import pytest
import torch

from primer_fast import backend
from primer_fast.bench import op as ops
from primer_fast.bench.agenda import planned
from primer_fast.bench.ceilings import matmul_precision
from primer_fast.bench.measure import prepared
from primer_fast.bench.op import PASSES, PRECISIONS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRECISION = "bfloat16" if DEVICE == "cuda" else "float32"

pytestmark = pytest.mark.skipif(backend.interpreting, reason="the time of an interpreter says nothing")

PARAMETERS = [
    pytest.param(group, provider, id=f"{group.op.name}-{group.case}-{group.pass_name}-{provider}")
    for group in planned(map(ops.load, ops.names()), [PRECISION], PASSES, DEVICE)
    for provider in group.providers()
]


@pytest.mark.parametrize(("group", "provider"), PARAMETERS)
def test_op(benchmark, group, provider):
    benchmark.group = str(group)
    with matmul_precision(PRECISIONS[PRECISION]):
        call, failure = prepared(group, provider)
        if failure.get("status") == "not available":
            pytest.skip(failure["reason"])
        if failure:
            pytest.fail(failure["reason"])

        def waited():
            call()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        benchmark(waited)
