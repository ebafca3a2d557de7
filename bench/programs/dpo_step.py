"""A DPO step beside TRL's, and on a GPU beside the same step in plain PyTorch."""

import copy

import torch
import torch.nn.functional as torch_F
from torch import Tensor

from primer_fast.bench.op import OURS
from primer_fast.bench.programs import nanogpt
from primer_fast.bench.programs.training_steps import Step, compare_steps
from primer_fast.bench.programs.transformer_step import (
    GPT2_SHAPE,
    GPT2_VOCAB,
    PLAIN,
    SMALL_SHAPE,
    SMALL_VOCAB,
    made,
    other_way,
)
from primer_fast.bench.programs.trl_step import Sizes, beside_trl
from primer_fast.bench.report import ProgramRow
from primer_fast.data.completions import CompletionPairs, Completions
from primer_fast.models.transformer import TransformerConfig
from primer_fast.train import cuda_graphs, dpo
from primer_fast.train.steps import autocast

PLAIN_TORCH = "plain PyTorch"
BATCHES = 8  # of pairs, then from the first again


def dpo_step(device: str, seconds: float, with_compile: bool, small: bool = False) -> list[ProgramRow]:
    """On a CPU a small model beside TRL; on a GPU GPT-2 124M beside plain PyTorch."""
    return beside_trl() if device == "cpu" else beside_plain(device, seconds, small)


def dpo_trl(device: str, seconds: float, with_compile: bool, small: bool = False) -> list[ProgramRow]:
    """Beside TRL on a GPU too, in the setting of a CPU but for bfloat16."""
    shape = Sizes(SMALL_VOCAB, width=16, layers=1, heads=1, pairs=2) if small else Sizes()
    return beside_trl(2 if small else 6, shape, device)


def beside_plain(device: str, seconds: float, small: bool) -> list[ProgramRow]:
    """With a CUDA graph and without; the reference's log-probabilities are computed beforehand, once for all."""
    shape = SMALL_SHAPE if small else GPT2_SHAPE | {"context": 256}
    model = TransformerConfig(SMALL_VOCAB if small else GPT2_VOCAB, **shape, **PLAIN)
    config = dpo.DPOConfig(lr=1e-5, schedule="constant", batch_size=2 if small else 16, precision="bfloat16")
    half = model.context // 2
    count = 2 if small else BATCHES
    pairs = make_pairs(count, config.batch_size, half, half, model.vocab)
    torch.manual_seed(0)
    first = made(model, device)
    reference = dpo.reference_log_probs(first, pairs, config)
    batches = [
        (pairs[rows], reference[rows]) for rows in torch.arange(len(pairs)).split(config.batch_size)
    ]  # on the CPU, as training has them

    rows = 2 * config.batch_size * model.context
    other, asked, by_default = other_way(first, rows)

    def ours(asked: bool | None) -> Step:
        state = dpo.start(copy.deepcopy(first), config)
        update = cuda_graphs.recorded(
            dpo.update, state, asked=asked, batch=config.batch_size, rows=rows, procedure="bench"
        )

        def step():
            dpo.train_step(state, *batches[state.step % count], config, 10**6, update)
            return state.window["loss"][-1]

        return step

    setting = (
        f"{model.layers} layers, width {model.width}, vocabulary {model.vocab:,}, {config.batch_size} pairs of {half} "
        f"+ {half // 2} to {half} tokens, {config.precision}, reference precomputed{by_default}"
    )
    steps = {OURS: lambda: ours(None), other: lambda: ours(asked)}
    steps[PLAIN_TORCH] = lambda: plain_step(nanogpt.twin(first), batches, config)
    return compare_steps(
        "dpo", setting, steps, work=config.batch_size, unit="pairs", seconds=seconds, device=device, tolerance=2e-2,
        small=small,
    )  # fmt: skip


def make_pairs(batches: int, size: int, prompt: int, completion: int, vocab: int) -> CompletionPairs:
    """Random tokens: prompts of ``prompt``, completions of ``completion`` down to half of it.

    Lengths are the same in every batch, as one recording of a step asks for.
    """
    draw, count = torch.Generator().manual_seed(0), batches * size
    prompts = torch.randint(vocab, (count, prompt), generator=draw)

    def side() -> Completions:
        written = torch.randint(vocab, (count, completion), generator=draw)
        lengths = torch.randint(completion // 2, completion + 1, (size,), generator=draw).repeat(batches)
        return Completions(torch.cat([prompts, written], dim=1), torch.full((count,), prompt), prompt + lengths)

    return CompletionPairs(side(), side(), torch.zeros(count))


def plain_step(model: nanogpt.NanoGPT, batches: list[tuple[CompletionPairs, Tensor]], config: dpo.DPOConfig) -> Step:
    """What one would write without a library: all logits in memory, log_softmax, gather. It measures the loss alone."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=config.betas, weight_decay=0.0, fused=True)
    device, taken = parameters[0].device, 0

    def step():
        nonlocal taken
        pairs, reference = batches[taken % len(batches)]
        batch = pairs.stacked().to(device)
        with autocast(device.type, config.precision):
            logits = model.logits(batch.tokens[:, :-1])
        log_probs = logits.float().log_softmax(dim=-1).gather(-1, batch.tokens[:, 1:, None]).squeeze(-1)
        summed = torch.where(batch.mask(), log_probs, 0.0).sum(dim=1)
        chosen, rejected = (summed - reference.to(device).T.flatten()).chunk(2)
        loss = -torch_F.logsigmoid(config.beta * (chosen - rejected)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        taken += 1
        return loss

    return step
