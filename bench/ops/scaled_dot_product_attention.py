"""Attention: ours against PyTorch's own choice of kernel, and against FlashAttention 2 and cuDNN by name."""

from primer_fast.backend import runs_triton
from primer_fast.bench.op import EAGER, FORWARD, FORWARD_BACKWARD, HOST_GOAL, OURS, OpGoal, declare, named, production
from primer_fast.bench.peers import FLASH, NotAvailable
from primer_fast.functional import fast_attention_backward, scaled_dot_product_attention
from primer_fast.kernels.attention.onepass import supported
from primer_fast.reference.case import Case
from primer_fast.reference.scaled_dot_product_attention import CASES, sizes

ONE_PASS = f"{OURS}, one-pass backward"


def one_pass(query, key, value, **options):
    """Ours with the backward whose additions have no fixed order."""
    if not runs_triton(query) or options.keys() - {"is_causal", "enable_gqa"} or not supported(query, key, value):
        raise NotAvailable(f"{ONE_PASS}: serves Triton, 16-bit heads to 128, all keys or causal")
    with fast_attention_backward():
        return scaled_dot_product_attention(query, key, value, **options)


def _case(name, why, B, H, T, D, S=None, HK=None, *, gradients=True, **options):
    S, HK = S or T, HK or H
    shapes = {"query": (B, H, T, D), "key": (B, HK, S, D), "value": (B, HK, S, D)}
    options |= {"enable_gqa": True} if HK != H else {}
    return Case(name, why, shapes, options, gradients=gradients)


GPU_CASES = (
    *production(CASES),
    _case("llama_8k", "heads of 128, between the published lengths", 2, 16, 8192, 128, is_causal=True),
    _case("head_64_16k", "heads of 64, long", 1, 32, 16384, 64, is_causal=True),
)
CPU_CASES = (
    _case("nanogpt", "nanoGPT's CPU model: 12 x 64 tokens", 12, 4, 64, 32, is_causal=True),
    _case("gpt2", "GPT-2 124M, one context of 512", 1, 12, 512, 64, is_causal=True),
    _case("decode", "GPT-2 124M writes a token", 1, 12, 1, 64, S=1024, gradients=False),
    _case("primer", "one small head: nothing but call overhead", 1, 1, 4, 8),
)


def _long_causal(case):
    _, _, _, T, S, D, _ = sizes(case)
    return case.options == {"is_causal": True} and T == S >= 4096 and D in (64, 128)


def _decodes(case):
    return sizes(case)[3] == 1


OP = declare(
    "scaled_dot_product_attention",
    beside={ONE_PASS: one_pass},
    gpu_cases=GPU_CASES,
    cpu_cases=CPU_CASES,
    goals=(
        # TFLOP/s of one H100, where FlashAttention 3 is published at 579, 616, 420 and 473
        *(
            OpGoal("rate", at_least=rate, passes=[FORWARD], precisions=["bfloat16"], where=named(name))
            for name, rate in (("llama_4k", 560), ("llama_16k", 600), ("head_64_4k", 420), ("head_64_16k", 470))
        ),
        OpGoal(f"versus {FLASH}", at_least=1.4, passes=[FORWARD_BACKWARD], precisions=["bfloat16"], where=_long_causal),
        OpGoal(f"versus {EAGER}", at_least=1, precisions=["bfloat16"], passes=[FORWARD], where=_decodes),
        HOST_GOAL,
    ),
)
