"""primer-fast sample: text that a trained transformer writes."""

import os

import torch

from primer_fast.cli.errors import sizes_that_fit
from primer_fast.cli.options.sample import Options, parse
from primer_fast.cli.options.train.training import device_of
from primer_fast.cli.run.base_run import load
from primer_fast.data import tokenizers
from primer_fast.data.tokenizers import Tokenizer
from primer_fast.models.generation import generate
from primer_fast.models.transformer import TransformerConfig

BYTES_OF_A_TOKEN = 64  # that is drawn: in tensors of int64, then in a list and in the text


def main(argv: list[str]) -> int:
    options = parse(argv)
    with sizes_that_fit():
        texts = run(options)
    for text in texts:
        print(text)
        if options.count > 1:
            print("-" * 40)
    return 0


def run(options: Options) -> list[str]:
    """The texts, each beginning with the prompt.

    Raises:
        ValueError: a folder that holds no transformer, a prompt that its tokenizer does not know or that is too long.
    """
    for name in ("tokens", "count"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be positive; got {getattr(options, name)}")
    if options.seed is not None and not -(2**63) <= options.seed < 2**63:
        raise ValueError(f"--seed must be from -2^63 to 2^63 - 1; got {options.seed}")
    device = device_of(options.device)
    model, tokenizer = load(options.run)
    _check_memory(options, model.config, cache=device == "cpu")
    model = model.to(device).eval()
    stops = list(tokenizer.stop_tokens)
    if options.line:
        end = tokenizers.line_end(tokenizer)
        if end is None:
            raise ValueError("--line: the model's tokenizer has no token for the end of a line")
        stops.append(end)
    prompt = encode_prompt(options.prompt, tokenizer, model.config.context)
    texts = generate(
        model, [torch.tensor(prompt, device=device)] * options.count, max_new_tokens=options.tokens, slide=True,
        temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, stop_tokens=stops,
        seed=options.seed,
    )  # fmt: skip
    written = (row.tolist() for row in texts.completions())
    return [options.prompt + tokenizer.decode(i for i in row if i not in stops) for row in written]


def _check_memory(options: Options, shape: TransformerConfig, *, cache: bool) -> None:
    """Refuse what this machine's memory cannot hold: the system may kill a process that asks for nearly all of it."""
    per_text = BYTES_OF_A_TOKEN * options.tokens
    if cache:
        keys = 2 * shape.layers * shape.key_heads * shape.head_width
        per_text += 4 * keys * min(shape.context, options.tokens)
    needed, there = options.count * per_text, memory()
    if there is not None and needed > there:
        raise ValueError(
            f"--tokens {options.tokens} and --count {options.count} need about {needed / 2**30:,.1f} GiB of memory; "
            f"this machine has {there / 2**30:,.1f}"
        )


def memory() -> int | None:
    """This machine's memory in bytes; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def encode_prompt(prompt: str, tokenizer: Tokenizer, context: int) -> list[int]:
    """The tokens of ``prompt``. An empty one becomes a stop token, else a line end, else the first token there is."""
    try:
        tokens = tokenizer.encode(prompt)
    except ValueError as error:
        raise ValueError(f"--prompt: {error}") from error
    if len(tokens) > context:
        raise ValueError(f"--prompt must fit the model's context of {context} tokens; got {len(tokens)}")
    if tokens:
        return tokens
    if tokenizer.stop_tokens:
        return [tokenizer.stop_tokens[0]]
    end = tokenizers.line_end(tokenizer)
    return [min(tokenizer.token_ids()) if end is None else end]
