"""python -m primer_fast.bench.stages.sanitized: every kernel once on small sizes, to be run under compute-sanitizer.

It says where it is, so that a tool that was stopped has said how far it came.
"""

import argparse
import sys

import torch

from primer_fast.functional import fast_attention_backward
from primer_fast.proof.native import ATTENTION, draw, run
from primer_fast.proof.on_gpu import case_named
from primer_fast.proof.verify import device
from primer_fast.reference.case import Case

ONE_PASS = "heads_last"  # of attention: with the backward of one pass
_HEADS = {"query": (1, 4, 1, 32), "key": (1, 2, 700, 32), "value": (1, 2, 700, 32)}
DECODE = Case("decode", "a query and many keys, no gradients", _HEADS, {"enable_gqa": True}, gradients=False)
# By op, those that most likely fail first: moved by descriptors and masked, by pointers, gathered, in rows
CASES = {
    ATTENTION: ("heads_last", "head_odd", "lengths_causal", "mask_of_keys"),
    "linear": ("edges_aligned", "below_tile", "long_reduction"),
    "mlp": ("edges_four", "output_odd"),
    "conv2d": ("boxes_exact", "boxes_stride", "few_stride", "depthwise_last"),
    "linear_cross_entropy": ("smoothed", "odd"),
    "linear_log_prob": ("entropy", "odd"),
    "max_pool2d": ("overlapping", "channels_last"),
    "embedding": ("characters", "position_ids"),
    "layer_norm": ("pre_norm", "long_rows"),
}


def cases(small: bool = False) -> list[tuple[str, Case]]:
    """The first case of every op, then the second of each; if ``small``, the first alone."""
    most = 1 if small else max(map(len, CASES.values()))
    chosen = [(op, case_named(op, names[i])) for i in range(most) for op, names in CASES.items() if i < len(names)]
    return [*chosen, (ATTENTION, DECODE)]


def _run(op: str, case: Case, how: str = "") -> None:
    print(f"at {op} {case} {how}".rstrip(), flush=True)
    where = device()
    arrays = draw(op, case, torch.bfloat16, "cpu")  # on the CPU: the sanitizer slows PyTorch's own kernels as well
    upstream = tuple(t.to(where) for t in run(op, case, arrays, plain=True)[1])
    run(op, case, {name: t.to(where) for name, t in arrays.items()}, upstream)
    if where == "cuda":
        torch.cuda.synchronize()


def main(argv: list[str] | None = None) -> int:
    """Run all cases, each with its name before it; the exit status is 0, or that of an error."""
    parser = argparse.ArgumentParser(prog="python -m primer_fast.bench.stages.sanitized", description=__doc__)
    parser.add_argument("--small", action="store_true", help="one case of each op")
    args = parser.parse_args(argv)
    for op, case in cases(args.small):
        _run(op, case)
    with fast_attention_backward():
        _run(ATTENTION, case_named(ATTENTION, ONE_PASS), "in one pass")
    print("at the end", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
