"""python -m primer_fast.bench.generation: tokens/s of greedy decoding, with the cache, without, and by `transformers`.

All of them decode the same weights; rounds are interleaved, ratios are medians of the rounds' own ratios.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time

import torch

from primer_fast.bench import goals
from primer_fast.bench.memory import peak_bytes
from primer_fast.bench.op import OURS
from primer_fast.bench.peers import failure
from primer_fast.bench.timing import rotated
from primer_fast.bench.trial import NOT_AVAILABLE, OK, WRONG, Trial
from primer_fast.models.generation import generate
from primer_fast.models.pretrained import load_gpt2
from primer_fast.models.transformer import Transformer, TransformerConfig

CACHE, GRAPH, NO_CACHE, TRANSFORMERS = "cache", "cache, CUDA graph", "no cache", "transformers"
TIE = 1e-3  # of the logits' standard deviation: two logits closer than this may come in either order
AT_LEAST = {NO_CACHE: goals.CACHE, TRANSFORMERS: goals.TRANSFORMERS}  # our rate with the cache over theirs


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m primer_fast.bench.generation", description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=16, help="tokens of a prompt")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def build(args):
    """Our model and `transformers`' GPT-2 with its weights; the latter is None where that package is missing."""
    torch.manual_seed(0)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.modules.setdefault("kernels", None)  # transformers looks for PyPI's package, and might find our folder
    try:
        import safetensors  # noqa: F401
        import transformers
    except ImportError:
        config = TransformerConfig(
            args.vocab, args.context, args.width, args.layers, args.heads,
            activation="gelu_tanh", norm="pre", positions="learned",
        )  # fmt: skip
        return Transformer(config).to(args.device).eval(), None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=args.vocab, n_positions=args.context, n_embd=args.width, n_layer=args.layers,
            n_head=args.heads, initializer_range=0.2, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = load_gpt2(folder)
    return ours.to(args.device).eval(), theirs.to(args.device).eval()


def decoders(args, ours, theirs, prompts):
    """By name, functions without arguments that return prompts and new tokens (B, P + N)."""

    def own(**options):
        return lambda: generate(ours, prompts, max_new_tokens=args.new_tokens, temperature=0, **options).tokens

    found = {CACHE: own(), NO_CACHE: own(cache=False)}
    if args.device == "cuda":
        found[GRAPH] = own(cuda_graph=True)
    if theirs is not None:
        settings = {"max_new_tokens": args.new_tokens, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        mask = torch.ones_like(prompts)
        found[TRANSFORMERS] = lambda: theirs.generate(prompts, attention_mask=mask, **settings)
    return found


def seconds(function, device) -> float:
    begin = time.perf_counter()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


@torch.no_grad()
def same_text(ours: Transformer, tokens: torch.Tensor, others: torch.Tensor) -> bool:
    """Whether two texts are equal, or part only where the two tokens' logits are a tie (see TIE)."""
    for row, other in zip(tokens, others, strict=True):
        if torch.equal(row, other):
            continue
        place = int((row != other).nonzero()[0])
        logits = ours.logits(ours.hidden(row[None, :place])[0, -1:])[0].float()
        if place == 0 or (logits[row[place]] - logits[other[place]]).abs() > TIE * logits.std():
            return False
    return True


def measure(args, ours, theirs, batch: int):
    """By name, the tokens that were written, the seconds of each round, and why one has none."""
    prompts = torch.randint(args.vocab, (batch, args.prompt), device=args.device)
    functions = decoders(args, ours, theirs, prompts)
    tokens, times, failures = {}, {name: [] for name in functions}, {}
    for round_ in range(-1, args.rounds):
        for name in rotated(list(functions), max(round_, 0)):
            if name in failures:
                continue
            try:
                if round_ < 0:
                    tokens[name] = functions[name]()
                else:
                    times[name].append(seconds(functions[name], args.device))
            except Exception as error:
                failures[name] = failure(error, args.device)
                if name == CACHE:
                    raise
    return functions, tokens, times, failures


def trials(argv=None) -> list[Trial]:
    """The same as trials, ours with the cache."""
    args, found = parse(argv), []
    ours, theirs = build(args)
    for batch in args.batch:
        functions, tokens, times, failures = measure(args, ours, theirs, batch)
        setting = (
            f"{args.layers} layers, width {args.width}, vocabulary {args.vocab}, batch {batch}, prompt {args.prompt}, "
            f"{args.new_tokens} new tokens, greedy"
        )
        for name, taken in times.items():
            trial = Trial("generation", setting, OURS if name == CACHE else name, unit="tokens")
            found.append(trial)
            if name in failures:
                trial.status, trial.reason = failures[name]
            elif not same_text(ours, tokens[CACHE], tokens[name]):
                trial.status, trial.reason = WRONG, "it writes other tokens than ours with the cache"
            if trial.status != OK:
                continue
            trial.time(taken, times[CACHE], batch * args.new_tokens)
            if (
                args.device == "cpu"
            ):  # on a GPU another run would take as long as all else, and a graph hides its memory
                peak = peak_bytes(functions[name], args.device)
                trial.peak_mib = None if peak is None else peak / 2**20
            if name in AT_LEAST:
                trial.targets.append(AT_LEAST[name].judged(trial.versus))
        if theirs is None:
            reason = "not installed: transformers or safetensors"
            found.append(Trial("generation", setting, TRANSFORMERS, NOT_AVAILABLE, reason))
    return found


def main(argv=None) -> int:
    args = parse(argv)
    ours, theirs = build(args)
    print(
        f"{args.layers} layers, {args.heads} heads, width {args.width}, prompt {args.prompt}, {args.new_tokens} new "
        f"tokens, {args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    if theirs is None:
        print("transformers or safetensors is not installed: its row is left out")
    missed = False
    for batch in args.batch:
        _, tokens, times, failures = measure(args, ours, theirs, batch)
        print(f"\nbatch {batch:<16} tokens/s   cache is faster by   tokens")
        for name, (_, reason) in failures.items():
            print(f"  {name}: {reason}")
        for name, taken in ((name, taken) for name, taken in times.items() if name not in failures):
            rate = batch * args.new_tokens / statistics.median(taken)
            faster = statistics.median(t / own for t, own in zip(taken, times[CACHE], strict=True))
            equal = same_text(ours, tokens[CACHE], tokens[name])
            target = AT_LEAST.get(name)
            missed |= target is not None and faster < target.at_least
            note = "" if target is None else f"   (target {target.at_least:g})"
            print(f"  {name:<20} {rate:>8.0f} {faster:>13.2f} x       {'equal' if equal else 'DIFFERENT'}{note}")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
