"""Greedy decoding with the cache of keys and values, without it, and by `transformers`: tokens a second.

All of them decode the same weights, one after the other in each round; ratios are medians of the rounds' own ratios.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from primer_fast.bench import goals
from primer_fast.bench.memory import peak_bytes
from primer_fast.bench.op import OURS
from primer_fast.bench.peers import noted
from primer_fast.bench.report import NOT_AVAILABLE, OK, WRONG, ProgramRow
from primer_fast.bench.timing import rotated, wait
from primer_fast.models.generation import generate
from primer_fast.models.pretrained import load_gpt2
from primer_fast.models.transformer import Transformer, TransformerConfig

GRAPH, NO_CACHE, TRANSFORMERS = "cache, CUDA graph", "no cache", "transformers"
TIE = 1e-3  # of the logits' standard deviation: two logits closer than this may come in either order
AT_LEAST = {NO_CACHE: goals.CACHE, TRANSFORMERS: goals.TRANSFORMERS}  # our rate with the cache over theirs


@dataclass(frozen=True)
class Texts:
    """Sizes of the model and of what it writes; ``batches``: how many texts at once, one after the other."""

    layers: int = 4
    heads: int = 4
    width: int = 128
    context: int = 512
    vocab: int = 512
    prompt: int = 16  # tokens
    new_tokens: int = 256
    batches: tuple[int, ...] = (1, 4)
    rounds: int = 5


GPT2 = Texts(12, 12, 768, 1024, 50257, batches=(1,), rounds=2)
SMALL = {"layers": 1, "heads": 2, "width": 16, "context": 16, "vocab": 32, "prompt": 4, "new_tokens": 2}


def generation(device: str, seconds: float, with_compile: bool, small: bool = False) -> list[ProgramRow]:
    """256 tokens by a small model, and by GPT-2 124M on a GPU."""
    texts = GPT2 if device == "cuda" else Texts()
    return compare(replace(texts, batches=(2,), rounds=1, **SMALL) if small else texts, device)


def build(texts: Texts, device: str) -> tuple[Transformer, torch.nn.Module | None]:
    """Our model and `transformers`' GPT-2 with its weights; the latter is None where that package is missing."""
    torch.manual_seed(0)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.modules.setdefault("kernels", None)  # transformers looks for PyPI's package, and might find our folder
    try:
        import safetensors  # noqa: F401
        import transformers
    except ImportError:
        config = TransformerConfig(
            texts.vocab, texts.context, texts.width, texts.layers, texts.heads,
            activation="gelu_tanh", norm="pre", positions="learned",
        )  # fmt: skip
        return Transformer(config).to(device).eval(), None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=texts.vocab, n_positions=texts.context, n_embd=texts.width, n_layer=texts.layers,
            n_head=texts.heads, initializer_range=0.2, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = load_gpt2(folder)
    return ours.to(device).eval(), theirs.to(device).eval()


def decoders(
    texts: Texts, device: str, ours: Transformer, theirs: torch.nn.Module | None, prompts: Tensor
) -> dict[str, Callable[[], Tensor]]:
    """By provider, functions without arguments that return prompts and new tokens (B, P + N)."""

    def own(**options):
        return lambda: generate(ours, prompts, max_new_tokens=texts.new_tokens, temperature=0, **options).tokens

    found = {OURS: own(), NO_CACHE: own(cache=False)}
    if device == "cuda":
        found[GRAPH] = own(cuda_graph=True)
    if theirs is not None:
        settings = {"max_new_tokens": texts.new_tokens, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        mask = torch.ones_like(prompts)
        found[TRANSFORMERS] = lambda: theirs.generate(prompts, attention_mask=mask, **settings)
    return found


@torch.no_grad()
def same_text(ours: Transformer, tokens: Tensor, others: Tensor) -> bool:
    """Whether two texts are equal, or part only where the two tokens' logits are a tie (see TIE)."""
    for row, other in zip(tokens, others, strict=True):
        if torch.equal(row, other):
            continue
        place = int((row != other).nonzero()[0])
        logits = ours.logits(ours.hidden(row[None, :place])[0, -1:])[0].float()
        if place == 0 or (logits[row[place]] - logits[other[place]]).abs() > TIE * logits.std():
            return False
    return True


def compare(texts: Texts, device: str) -> list[ProgramRow]:
    """The rows of each batch: ours with the cache, then the others.

    Raises:
        Exception: ours failed; whatever it raised.
    """
    found = []
    ours, theirs = build(texts, device)
    for batch in texts.batches:
        setting = (
            f"{texts.layers} layers, width {texts.width}, vocabulary {texts.vocab}, batch {batch}, "
            f"prompt {texts.prompt}, {texts.new_tokens} new tokens, greedy"
        )
        prompts = torch.randint(texts.vocab, (batch, texts.prompt), device=device)
        functions = decoders(texts, device, ours, theirs, prompts)
        rows = {name: ProgramRow("generation", setting, name, unit="tokens") for name in functions}
        tokens, times = _written(functions, rows, texts.rounds, device)
        for name, row in rows.items():
            if row.status == OK and not same_text(ours, tokens[OURS], tokens[name]):
                row.status, row.reason = WRONG, "it writes other tokens than ours with the cache"
            if row.status != OK:
                continue
            row.time(times[name], times[OURS], batch * texts.new_tokens)
            if device == "cpu":  # on a GPU another run would take as long as all else, and a graph hides its memory
                peak = peak_bytes(functions[name], device)
                row.peak_mib = None if peak is None else peak / 2**20
            if name in AT_LEAST:
                row.targets.append(AT_LEAST[name].judged(row.versus))
        found += rows.values()
        if theirs is None:
            reason = "not installed: transformers or safetensors"
            found.append(ProgramRow("generation", setting, TRANSFORMERS, status=NOT_AVAILABLE, reason=reason))
    return found


def _written(
    functions: dict[str, Callable[[], Tensor]], rows: dict[str, ProgramRow], rounds: int, device: str
) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    """By provider, the tokens of a first call, and the seconds of each round; a failure is noted in its row."""
    tokens, times = {}, {name: [] for name in functions}
    for round_ in range(-1, rounds):
        for name in rotated(list(functions), max(round_, 0)):
            if rows[name].status != OK:
                continue
            with noted(rows[name], device):
                begin = time.perf_counter()
                written = functions[name]()
                wait(device)
                if round_ < 0:
                    tokens[name] = written
                else:
                    times[name].append(time.perf_counter() - begin)
    return tokens, times
