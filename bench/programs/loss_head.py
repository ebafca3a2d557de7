"""The loss of a language model's head at GPT-2's vocabulary, forward and backward: time and memory."""

import torch
import torch.nn.functional as torch_F
from torch import Tensor

from primer_fast.bench import goals
from primer_fast.bench.op import OURS
from primer_fast.bench.peers import PEERS
from primer_fast.bench.programs.training_steps import COMPARED, Step, compare_steps
from primer_fast.bench.report import OK, ProgramRow
from primer_fast.functional.linear_cross_entropy import linear_cross_entropy

LOGITS = "linear + cross_entropy"
VOCAB = 50257
SIZES = {"cpu": (1024, 256, torch.float32), "cuda": (8192, 768, torch.bfloat16)}  # tokens, GPT-2's width on a GPU


def logits_in_memory(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    return torch_F.cross_entropy(torch_F.linear(input, linear_weight), target)


def loss_head(
    device: str, seconds: float, with_compile: bool, small: bool = False, rows: int | None = None,
    width: int | None = None, vocab: int | None = None,
) -> list[ProgramRow]:  # fmt: skip
    """Loss and both gradients of ``rows`` tokens; the memory goal is ours over that of logits in memory."""
    usual_rows, usual_width, dtype = SIZES[device]
    rows, width, vocab = rows or (16 if small else usual_rows), width or (16 if small else usual_width), vocab or VOCAB
    vocab = 64 if small else vocab
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator).to(device, dtype).requires_grad_()
    w = torch.randn(vocab, width, generator=generator).div_(width**0.5).to(device, dtype).requires_grad_()
    target = torch.randint(vocab, (rows,), generator=generator).to(device)

    def program(function) -> Step:
        def step():
            loss = function(x, w, target)
            torch.autograd.grad(loss, (x, w))
            return loss.detach()

        return step

    functions = {OURS: linear_cross_entropy, LOGITS: logits_in_memory, **PEERS["linear_cross_entropy"]}
    setting = f"{rows:,} tokens, width {width}, vocabulary {vocab:,}, {str(dtype)[6:]}, forward and both gradients"
    compared = compare_steps(
        "loss_head", setting, {name: lambda f=f: program(f) for name, f in functions.items()}, work=rows,
        unit="tokens", seconds=seconds, device=device, tolerance=1e-4 if dtype is torch.float32 else 2e-2,
        compared=1 if small else COMPARED, small=small,
    )  # fmt: skip
    ours, logits = compared[:2]
    if ours.status == logits.status == OK and ours.peak_mib is not None and logits.peak_mib:
        ours.targets.append(goals.LOSS_MEMORY.judged(ours.peak_mib / logits.peak_mib))
    return compared
