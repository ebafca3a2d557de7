"""Run by test_no_host_sync.py in a process that does not interpret: every case on tensors without memory, as JSON.

Launches are counted, not compiled: what is asked here is what the launchers do on the host.
"""

import contextlib
import json
import sys

import torch
from triton.runtime.jit import JITFunction

sys.path.insert(0, "tests")

from citizenship.no_host_sync import HostSync, NoHostSync

from primer_fast import functional
from primer_fast.proof.inputs import allocate
from primer_fast.proof.offline import offline
from primer_fast.proof.verify import ops
from primer_fast.reference.case import arguments
from primer_fast.reference.ops import OPS


def both_ways(op, case):
    inputs = {}
    for name, shape in case.shapes.items():
        dtype = getattr(torch, case.dtypes[name]) if name in case.dtypes else torch.bfloat16
        inputs[name] = allocate(shape, case.layouts.get(name), dtype, "meta")
        inputs[name].requires_grad_(name in OPS[op].differentiable(case))
    leaves = [t for t in inputs.values() if t.requires_grad]
    with NoHostSync():
        outputs = getattr(functional, op)(**arguments(inputs), **case.options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        outputs = [y for y in outputs if y.requires_grad]
        if leaves and outputs:
            torch.autograd.grad(outputs, leaves, [torch.empty_like(y) for y in outputs], allow_unused=True)


def reading_is_seen():
    with contextlib.suppress(HostSync, RuntimeError):
        with NoHostSync():
            torch.empty(1, device="meta").item()
        return False
    return True


if __name__ == "__main__":
    launches, failed = dict.fromkeys(ops(), 0), {}
    with offline("sm_90"):
        for op in ops():

            def count(self, *args, op=op, **kwargs):
                launches[op] += 1

            JITFunction.run = count
            for case in OPS[op].cases:
                try:
                    both_ways(op, case)
                except Exception as error:
                    failed[f"{op} {case.name}"] = f"{type(error).__name__}: {error}"[:300]
    json.dump({"launches": launches, "failed": failed, "reading is seen": reading_is_seen()}, sys.stdout)
