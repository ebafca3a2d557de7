"""What is measured first on a GPU, where time is short: the rows that targets are set for, in order of importance."""

from collections.abc import Iterable
from typing import NamedTuple

from primer_fast.bench.measure import Group
from primer_fast.bench.op import FORWARD, FORWARD_BACKWARD, PASSES, Op


class Entry(NamedTuple):
    """Cases of one op in one precision, with their passes."""

    op: str
    cases: tuple[str, ...]
    passes: tuple[str, ...] = PASSES
    precision: str = "bfloat16"


_ATTENTION = "scaled_dot_product_attention"
AGENDA = (
    Entry("linear", ("square_4096", "square_8192", "gpt2_up", "square_1024", "square_512")),
    Entry("linear", ("square_4096",), (FORWARD,), "float32"),
    Entry(_ATTENTION, ("llama_4k", "llama_16k", "head_64_4k", "head_64_16k"), (FORWARD,)),
    Entry(_ATTENTION, ("llama_8k", "llama_16k", "head_64_4k"), (FORWARD_BACKWARD,)),
    Entry("layer_norm", ("width_1024", "width_4096", "width_8192", "width_32768"), (FORWARD,)),
    Entry("layer_norm", ("width_1024", "width_4096", "width_8192", "width_32768"), (FORWARD_BACKWARD,)),
    Entry("max_pool2d", ("stem", "stem_contiguous")),
    Entry("conv2d", ("resnet_3x3_64", "resnet_3x3_256", "resnet_3x3_512", "resnet_1x1_256_64", "resnet_stem")),
    Entry("linear_cross_entropy", ("qwen", "gpt2")),
    Entry("linear_log_prob", ("llama",)),
    Entry("embedding", ("gpt2",)),
    Entry(_ATTENTION, ("decode_8k",), (FORWARD,)),
)
# The same as (op, case, precision, pass), one of each row
ROWS = [(entry.op, case, entry.precision, p) for entry in AGENDA for case in entry.cases for p in entry.passes]


def planned(
    loaded: Iterable[Op], precisions: Iterable[str], passes: Iterable[str], device: str, most: int | None = None
) -> list[Group]:
    """Groups, the most important first: on a GPU those of the agenda, then all others, one precision at a time."""
    loaded, precisions, passes = list(loaded), list(precisions), list(passes)
    others = [
        Group(op, case, precision, pass_name, device)
        for precision in precisions
        for op in loaded
        for case in op.cases(device)[:most]
        for pass_name in op.passes(passes)
        if case.gradients or pass_name == FORWARD
    ]
    if device != "cuda":
        return others
    named = {(g.op.name, g.case.name, g.precision, g.pass_name): g for g in others}
    first = [named.pop(key) for key in ROWS if key in named]
    return first + list(named.values())
