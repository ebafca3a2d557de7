"""How long each stage of `make gpu` should take on one H100, computed without a GPU.

Launches, rows and operations are counted. What a launch costs the compiler is measured; times of a GPU are assumed.
"""

from primer_fast.bench import models
from primer_fast.bench import op as ops
from primer_fast.bench.agenda import ROWS, planned
from primer_fast.bench.gpu import SECONDS_PER_ROW
from primer_fast.bench.measure import HOST_MS, Group
from primer_fast.bench.op import PASSES, PRECISIONS
from primer_fast.bench.stages import right
from primer_fast.bench.stages.compile import both_ways, our_units
from primer_fast.bench.timing import MIN_ROUNDS, WARMUP_ROUNDS
from primer_fast.proof.production import compiled_launches

COMPILE = 0.24  # seconds of one core for a launch: 706 took 170 on a machine of two cores, sm_90, Triton 3.7.1
_STARTING = 8.0  # assumed: a process's imports, and the GPU's context
_FLOPS, _BYTES = 4e14, 2e12  # assumed: a second, of 16-bit products and of memory
_ROUND = 5e-4  # assumed: what flushing the cache and the host add to a call
_GROUP = 1.5  # assumed: a row's tensors, the comparison with eager, torch.compile from its cache


def launches() -> int:
    """How many the stage *compile* compiles; counted by running the launchers, without a compiler."""
    counted = 0

    def count(kernel: str) -> bool:
        nonlocal counted
        counted += 1
        return False

    for unit in our_units():
        for one in both_ways(unit):
            compiled_launches(one, wanted=count)
    return counted


def group_seconds(group: Group) -> float:
    """A row of the benchmarks with all its providers."""
    flops, moved = group.work
    flops *= PRECISIONS[group.precision].dtype.itemsize / 2
    call = max(flops / _FLOPS, moved / _BYTES) + _ROUND
    host = 50 * call if call < HOST_MS / 1e3 else 0.0
    one = max(SECONDS_PER_ROW, MIN_ROUNDS * call) + (WARMUP_ROUNDS + 4) * call + host
    return _GROUP + len(group.providers()) * one


def lines(cores: int) -> list[str]:
    """A line for each stage, on a machine of so many cores."""
    count, checks = launches(), right.checks()
    rows = planned([ops.load(name) for name in ops.names()], PRECISIONS, PASSES, "cuda")
    first = rows[: len(ROWS)]
    asked, everything = (_STARTING + sum(map(group_seconds, some)) for some in (first, rows))
    programs = models.ESTIMATES | {"gpt2_compiled": models.COMPILED_BEFORE}  # as the first stage leaves it
    programs = {name: programs[name] for name in models.ON_GPU}
    named = ", ".join(f"{name} {seconds:.0f}" for name, seconds in programs.items())
    compiling = _STARTING + count * COMPILE / cores
    return [
        f"compile    {compiling:4.0f} s: {count:,} launches on {cores} cores, without those of torch.compile",
        f"right      {_STARTING + right.estimate(checks):4.0f} s: {len(checks)} checks",
        f"fast       {asked:4.0f} s: the {len(first)} rows of the agenda; all {len(rows)} rows: {everything:.0f} s",
        f"programs   {_STARTING + sum(programs.values()):4.0f} s: {named}",
        "sanitizer   what is left: two tools",
    ]
