"""A training step of the transformer beside nanoGPT's: the same weights, windows, schedule and optimizer settings."""

import torch

from primer_fast.bench import goals, nanogpt
from primer_fast.bench.op import OURS
from primer_fast.bench.trial import Goal, Trial
from primer_fast.bench.turns import Step, take_turns
from primer_fast.data.text import load_text, tokenize
from primer_fast.data.tokenizers import make
from primer_fast.models.transformer import Transformer, TransformerConfig
from primer_fast.train import language_model
from primer_fast.train.common import autocast, learning_rate
from primer_fast.train.language_model import LanguageModelConfig

OURS_COMPILED = f"{OURS}, torch.compile"
NANOGPT, COMPILED, FUSED = "nanoGPT", "nanoGPT, torch.compile", "nanoGPT, fused AdamW"
BATCHES = 256  # drawn beforehand, then from the first again
PLAIN = {"norm": "pre", "positions": "learned", "bias": False}  # nanoGPT's train.py, like exact GELU and a tied output
# nanoGPT's README: the setting for a CPU, config/train_shakespeare_char.py without its dropout, config/train_gpt2.py
CPU_SHAPE = {"context": 64, "width": 128, "layers": 4, "heads": 4}
GPU_SHAPE = {"context": 256, "width": 384, "layers": 6, "heads": 6}
GPT2_SHAPE = {"context": 1024, "width": 768, "layers": 12, "heads": 12}
GPT2_VOCAB = 50304  # GPT-2's 50,257 in nanoGPT's multiple of 64


def characters(device: str, seconds: float, with_compile: bool) -> list[Trial]:
    """nanoGPT's model of characters in its setting for this device, on the text that comes with Python."""
    text = load_text("builtin")
    shape, batch = (CPU_SHAPE, 12) if device == "cpu" else (GPU_SHAPE, 64)
    tokenizer = make("characters", text)
    tokens = tokenize(text, tokenizer, shape["context"]).train
    model = TransformerConfig(tokenizer.vocab_size, **shape, **PLAIN)
    train = LanguageModelConfig(batch_size=batch, precision="float32" if device == "cpu" else "bfloat16")
    bounds = {NANOGPT: goals.NANOGPT} if device == "cpu" else {}
    return compare("nanogpt", model, train, tokens, device, seconds, with_compile, bounds)


def gpt2(device: str, seconds: float, with_compile: bool) -> list[Trial]:
    """GPT-2 124M, a micro-batch of nanoGPT's; on a CPU one short window, which takes seconds."""
    shape = GPT2_SHAPE if device == "cuda" else GPT2_SHAPE | {"context": 128}
    model = TransformerConfig(GPT2_VOCAB, **shape, **PLAIN)
    train = LanguageModelConfig(
        batch_size=12 if device == "cuda" else 1, lr=6e-4, min_lr=6e-5, warmup_steps=2000, steps=600_000,
        betas=(0.9, 0.95), precision="bfloat16" if device == "cuda" else "float32",
    )  # fmt: skip
    tokens = torch.randint(50257, (1 << 20,), generator=torch.Generator().manual_seed(0))
    bounds = {COMPILED: goals.GPT2} if device == "cuda" else {}
    trials = compare("gpt2", model, train, tokens, device, seconds, with_compile, bounds)
    if device == "cuda":
        ours = next(trial for trial in trials if trial.provider == OURS)
        used = ours.rate * flops_per_token(model) / 989e12
        ours.targets.append(goals.GPT2_USE.judged(used))
    return trials


def flops_per_token(model: TransformerConfig) -> float:
    """Of a training step: 6 for every weight of a product, and attention's (Chowdhery et al. 2022, appendix B)."""
    weights = model.layers * 12 * model.width**2 + model.vocab * model.width
    return 6 * weights + 12 * model.layers * model.width * model.context


def compare(
    name: str, model: TransformerConfig, train: LanguageModelConfig, tokens: torch.Tensor, device: str, seconds: float,
    with_compile: bool, bounds: dict[str, Goal],
) -> list[Trial]:  # fmt: skip
    """Trials of one step with ``tokens`` (N,) cut into windows."""
    torch.manual_seed(0)
    first = Transformer(model).to(device)
    windows = [language_model.batch(tokens, model.context, train, i).to(device) for i in range(BATCHES)]

    def ours(compiled: bool) -> Step:
        made = Transformer(model).to(device)
        made.load_state_dict(first.state_dict())
        if compiled:
            made.loss = torch.compile(made.loss)
        state = language_model.start(made, train)

        def step():
            language_model.train_step(state, windows[state.step % BATCHES], train)
            return state.window["loss"][-1]

        return step

    def published(compiled: bool, fused: bool):
        return lambda: nanogpt_step(nanogpt.twin(first), windows, train, compiled=compiled, fused=fused)

    on_gpu = device == "cuda"
    steps = {OURS: lambda: ours(False), NANOGPT: published(False, on_gpu)}
    if with_compile:
        steps |= {OURS_COMPILED: lambda: ours(True), COMPILED: published(True, on_gpu)}
    steps |= {} if on_gpu else {FUSED: published(False, True)}
    setting = (
        f"{model.layers} layers, {model.heads} heads, width {model.width}, context {model.context}, "
        f"batch {train.batch_size}, vocabulary {model.vocab:,}, {train.precision}"
    )
    return take_turns(
        name, setting, steps, work=train.batch_size * model.context, unit="tokens", seconds=seconds, device=device,
        goals=bounds, tolerance=1e-4 if train.precision == "float32" else 2e-2,
    )  # fmt: skip


def nanogpt_step(
    model: nanogpt.NanoGPT, windows: list[torch.Tensor], train: LanguageModelConfig, *, compiled: bool, fused: bool
) -> Step:
    """Forward, backward, clipping, AdamW and the schedule as nanoGPT's training loop orders them."""
    optimizer = nanogpt.optimizer(
        model, lr=train.lr, weight_decay=train.weight_decay, betas=train.betas, fused=fused
    )  # fmt: skip
    device = windows[0].device.type
    scaler = torch.amp.GradScaler(device, enabled=train.precision == "float16")
    run = torch.compile(model) if compiled else model
    taken = 0

    def step():
        nonlocal taken
        window = windows[taken % len(windows)]
        rate = learning_rate(
            taken, peak=train.lr, minimum=train.min_lr, warmup=train.warmup_steps, total=train.steps, cosine=True
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        with autocast(device, train.precision):
            _, loss = run(window[:, :-1], window[:, 1:])
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        taken += 1
        return loss.detach()

    return step
