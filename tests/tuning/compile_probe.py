"""Run by test_compile.py in a process that compiles: prints as JSON what the pruning made of a few candidates.

Then it becomes the command whose options it is called with: a dry run of `primer-fast tune`, by both its names.
"""

import json
import os
import runpy
import sys
from functools import partial

from primer_fast.kernels.product import MatmulSettings
from primer_fast.kernels.tunable import Variant, watching
from primer_fast.proof.offline import offline
from primer_fast.proof.targets import TARGETS, target_of
from primer_fast.tuning import prune
from primer_fast.tuning.compile import CandidateTask, Workers, chip_of, compile_candidate
from primer_fast.tuning.problems import Candidate, arrays_of, decisions_of, distinct, run, units


def decisions(all_units, gpu, target):
    return distinct(decision for unit in all_units for decision in decisions_of(unit, gpu, target))


def owned(decision, settings):
    """Kernels whose launches are made with the settings, in their order."""
    names, candidate = [], Candidate(decision, settings)
    with (
        offline(target, wanted=lambda kernel: names.append(kernel) if candidate.owns(kernel) else None),
        watching(candidate),
    ):
        run(decision.unit, arrays_of(decision.unit, "meta"))
    return names


if __name__ == "__main__":  # processes that compile import this file again
    target = TARGETS["sm_90"]
    gpu = chip_of(target)
    every = decisions(units(["linear", "max_pool2d"], ["bfloat16"]), gpu, target)
    decision = next(decision for decision in every if decision.choice == "matmul")
    default = decision.space.choice.default(gpu, decision.problem)
    spilling = MatmulSettings(128, 256, 64, 4, 2)  # 256 accumulators a thread, and there are 255 registers
    large = MatmulSettings(128, 256, 128, 8, 3)  # 3 stages of 96 KiB, and there are 227
    tasks = [CandidateTask(decision, s, gpu, target) for s in (default, spilling, large)]
    os.environ["TRITON_INTERPRET"] = "1"  # of this process, as it would be where kernels are interpreted
    with Workers(1) as workers:
        compilers = workers.compile(tasks)
        found_there = workers.map(partial(decisions_of, gpu=gpu, target=target), [decision.unit])
        compiled = [compilers.result(decision, task.settings, 250) for task in tasks]
    assert os.environ.pop("TRITON_INTERPRET") == "1"
    twice = [compile_candidate(CandidateTask(decision, s, gpu, target)) for s in (default, default._replace(GROUP_M=8))]
    other = gpu._replace(arch="sm_89", shared=101376, processors=142)
    backward = next(decision for decision in every if decision.choice == "linear_backward")
    asked = []
    with offline(target, wanted=lambda kernel: asked.append(kernel)) as unwanted:
        run(decision.unit, arrays_of(decision.unit, "meta"))
    json.dump(
        {
            "gpu": gpu,
            "decisions": [str(decision) for decision in every],
            "convolution": [str(decision) for decision in decisions(units(["conv2d"], ["bfloat16"])[:1], gpu, target)],
            "asked": [asked, len(unwanted)],
            "whole": len(compile_candidate(CandidateTask(decision, None, gpu, target)).code.split("_kernel(")) - 1,
            "units": sorted({decision.unit.op for decision in every}),
            "errors": [c.error for c in compiled],
            "spilled": [c.spill_bytes for c in compiled],
            "registers": [c.registers for c in compiled],
            "kept": prune.by_compile(compiled, default, target.shared_per_program),
            "default": default,
            "equal": twice[0].code == twice[1].code != "",
            "sm_89": [target_of(other).triton.arch, target_of(other).shared_per_program, target_of(other).processors],
            "there": [str(decision) for decision in distinct(found_there[0])]
            == [str(s) for s in decisions([decision.unit], gpu, target)],
            "prepass": compile_candidate(CandidateTask(backward, Variant("prepass"), gpu, target))[1:4],
            "ways": {name: owned(backward, Variant(name)) for name in ("fused", "prepass")},
            "known": target_of(gpu) is target,
        },
        sys.stdout,
    )
    print()
    if len(sys.argv) > 1:
        from primer_fast.cli import tune

        print(tune.main(sys.argv[1:]), flush=True)
        runpy.run_module("primer_fast.tuning", run_name="__main__")
