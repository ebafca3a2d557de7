"""A training step of the transformer beside nanoGPT's: the same weights, windows, schedule and optimizer settings."""

import copy

import torch

from primer_fast.bench import goals
from primer_fast.bench.op import OURS
from primer_fast.bench.peers import NotAvailable
from primer_fast.bench.programs import nanogpt
from primer_fast.bench.programs.training_steps import COMPARED, Step, compare_steps
from primer_fast.bench.report import Goal, ProgramRow
from primer_fast.data.text import load_text, tokenize
from primer_fast.data.tokenizers import make
from primer_fast.models.transformer import Transformer, TransformerConfig
from primer_fast.train import cuda_graphs, language_model
from primer_fast.train.language_model import LanguageModelConfig
from primer_fast.train.steps import autocast, learning_rate

OURS_COMPILED = f"{OURS}, torch.compile"
GRAPH, NO_GRAPH = f"{OURS}, CUDA graph", f"{OURS}, no CUDA graph"  # on a GPU beside ours by default, which is either
NANOGPT, COMPILED, FUSED = "nanoGPT", "nanoGPT, torch.compile", "nanoGPT, fused AdamW"
BATCHES = 256  # drawn beforehand, then from the first again
PLAIN = {"norm": "pre", "positions": "learned", "bias": False}  # nanoGPT's train.py, like exact GELU and a tied output
# nanoGPT's README: the setting for a CPU, config/train_shakespeare_char.py without its dropout, config/train_gpt2.py
CPU_SHAPE = {"context": 64, "width": 128, "layers": 4, "heads": 4}
GPU_SHAPE = {"context": 256, "width": 384, "layers": 6, "heads": 6}
GPT2_SHAPE = {"context": 1024, "width": 768, "layers": 12, "heads": 12}
GPT2_VOCAB = 50304  # GPT-2's 50,257 in nanoGPT's multiple of 64
SMALL_SHAPE, SMALL_VOCAB = {"context": 8, "width": 16, "layers": 1, "heads": 1}, 32  # for a rehearsal


def characters(device: str, seconds: float, with_compile: bool, small: bool = False) -> list[ProgramRow]:
    """nanoGPT's model of characters in its setting for this device, on the text that comes with Python.

    On a GPU torch.compile is left to GPT-2: it takes most of a minute.
    """
    text = load_text("builtin")
    shape, batch = (CPU_SHAPE, 12) if device == "cpu" else (SMALL_SHAPE, 2) if small else (GPU_SHAPE, 64)
    tokenizer = make("characters", text)
    tokens = tokenize(text, tokenizer, shape["context"]).train
    model = TransformerConfig(tokenizer.vocab_size, **shape, **PLAIN)
    train = LanguageModelConfig(batch_size=batch, precision="float32" if device == "cpu" else "bfloat16")
    bounds = {NANOGPT: goals.NANOGPT} if device == "cpu" else {}
    with_compile = with_compile and device == "cpu"
    return compare("nanogpt", model, train, tokens, device, seconds, with_compile, bounds, small)


def gpt2(device: str, seconds: float, with_compile: bool, small: bool = False) -> list[ProgramRow]:
    """GPT-2 124M, a micro-batch of nanoGPT's; on a CPU one short window, which takes seconds.

    On a GPU torch.compile is left to ``gpt2_compiled``: if that hangs, these figures are written already.
    """
    compared, model = _gpt2(device, seconds, with_compile and device == "cpu", small)
    if device == "cuda":
        ours = next(row for row in compared if row.provider == OURS)
        ours.targets.append(goals.GPT2_USE.judged(ours.rate * flops_per_token(model) / 989e12))
    return compared


def gpt2_compiled(device: str, seconds: float, with_compile: bool, small: bool = False) -> list[ProgramRow]:
    """The step of ``gpt2`` on a GPU beside nanoGPT with torch.compile.

    Raises:
        NotAvailable: torch.compile is left out, or a CPU, where ``gpt2`` has it.
    """
    if device == "cpu" or not with_compile:
        raise NotAvailable("on a CPU gpt2 has it" if device == "cpu" else "torch.compile was to be left out")
    return _gpt2(device, seconds, True, small)[0]


def compile_nanogpt(small: bool = False) -> None:
    """One step of what ``gpt2_compiled`` compares with: what Inductor makes of it stays in its cache on disk."""
    model, train, tokens = _gpt2_setting("cuda", small)
    windows = [language_model.batch(tokens, model.context, train, 0).to("cuda")]
    nanogpt_step(nanogpt.twin(made(model, "cuda")), windows, train, compiled=True, fused=True)()
    torch.cuda.synchronize()


def _gpt2(device: str, seconds: float, compiled: bool, small: bool) -> tuple[list[ProgramRow], TransformerConfig]:
    model, train, tokens = _gpt2_setting(device, small)
    bounds = {COMPILED: goals.GPT2} if device == "cuda" else {}
    return compare("gpt2", model, train, tokens, device, seconds, compiled, bounds, small), model


def _gpt2_setting(device: str, small: bool) -> tuple[TransformerConfig, LanguageModelConfig, torch.Tensor]:
    shape = SMALL_SHAPE if small else GPT2_SHAPE if device == "cuda" else GPT2_SHAPE | {"context": 128}
    vocab, batch = (SMALL_VOCAB, 2) if small else (GPT2_VOCAB, 12 if device == "cuda" else 1)
    model = TransformerConfig(vocab, **shape, **PLAIN)
    train = LanguageModelConfig(
        batch_size=batch, lr=6e-4, min_lr=6e-5, warmup_steps=2000, steps=600_000,
        betas=(0.9, 0.95), precision="bfloat16" if device == "cuda" else "float32",
    )  # fmt: skip
    return model, train, torch.randint(min(vocab, 50257), (1 << 20,), generator=torch.Generator().manual_seed(0))


def made(config: TransformerConfig, device: str) -> Transformer:
    """A model whose first weights are drawn on ``device``: a CPU would take seconds for GPT-2's."""
    with torch.device(device):
        return Transformer(config)


def other_way(model: torch.nn.Module, rows: int) -> tuple[str, bool, str]:
    """What is timed on a GPU beside ours: by default training records a CUDA graph of its step where that pays.

    -> the name of the other way, the option ``cuda_graphs`` that asks for it, and words for the default.
    """
    pays = cuda_graphs.pays(model, rows)
    name = NO_GRAPH if pays else GRAPH
    return name, not pays, f", ours {'with' if pays else 'without'} a CUDA graph by default"


def flops_per_token(model: TransformerConfig) -> float:
    """Of a training step: 6 for every weight of a product, and attention's (Chowdhery et al. 2022, appendix B)."""
    weights = model.layers * 12 * model.width**2 + model.vocab * model.width
    return 6 * weights + 12 * model.layers * model.width * model.context


def compare(
    name: str, model: TransformerConfig, train: LanguageModelConfig, tokens: torch.Tensor, device: str, seconds: float,
    with_compile: bool, bounds: dict[str, Goal], small: bool = False,
) -> list[ProgramRow]:  # fmt: skip
    """Rows of one step with ``tokens`` (N,) cut into windows.

    On a GPU, OURS is what training does by default, with a CUDA graph or without; goals are judged on it. The other of
    the two stands beside it, or with torch.compile nanoGPT compiled.
    """
    torch.manual_seed(0)
    first = made(model, device)
    windows = [language_model.batch(tokens, model.context, train, i).to(device) for i in range(BATCHES)]
    rows = train.batch_size * model.context

    def ours(compiled: bool, asked: bool | None = None) -> Step:
        own = copy.deepcopy(first)
        if compiled:
            own.loss = torch.compile(own.loss)
        state = language_model.start(own, train)
        update = cuda_graphs.recorded(
            language_model.update, state, asked=asked, batch=train.batch_size, rows=rows, procedure="bench"
        )

        def step():
            language_model.train_step(state, windows[state.step % BATCHES], train, update)
            return state.window["loss"][-1]

        return step

    def published(compiled: bool, fused: bool):
        return lambda: nanogpt_step(nanogpt.twin(first), windows, train, compiled=compiled, fused=fused)

    setting = (
        f"{model.layers} layers, {model.heads} heads, width {model.width}, context {model.context}, "
        f"batch {train.batch_size}, vocabulary {model.vocab:,}, {train.precision}"
    )
    if device == "cuda":
        other, asked, by_default = other_way(first, rows)
        beside = {other: lambda: ours(False, asked), NANOGPT: published(False, True)}
        steps = {OURS: lambda: ours(False)} | ({COMPILED: published(True, True)} if with_compile else beside)
        setting += by_default + (", beside torch.compile" if with_compile else "")
    else:
        steps = {OURS: lambda: ours(False), NANOGPT: published(False, False)}
        steps |= {OURS_COMPILED: lambda: ours(True), COMPILED: published(True, False)} if with_compile else {}
        steps[FUSED] = published(False, True)
    return compare_steps(
        name, setting, steps, work=rows, unit="tokens", seconds=seconds, device=device, goals=bounds, small=small,
        compared=1 if small and (with_compile or name != "gpt2") else COMPARED,
        tolerance=1e-4 if train.precision == "float32" else 2e-2,
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
