"""primer-fast sample: text that a trained transformer writes."""

from primer_fast.cli import threads  # noqa: F401

# isort: split

import sys
from pathlib import Path

import torch

from primer_fast.cli import checkpoint, interruption
from primer_fast.cli.gpt_tasks import SHAPE, TOKENIZER, read_shape
from primer_fast.cli.options.sample import Options, parse
from primer_fast.cli.run_folder import RunFolder, load_weights, read_safetensors
from primer_fast.data import tokenizers
from primer_fast.data.tokenizers import Tokenizer
from primer_fast.models.generation import generate
from primer_fast.models.pretrained import load_gpt2
from primer_fast.models.transformer import Transformer


def main(argv: list[str]) -> int:
    try:
        options = parse(argv)
        for text in run(options):
            print(text)
            if options.count > 1:
                print("-" * 40)
    except SystemExit as stop:  # tyro has printed the help, or what is wrong with the arguments
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt as stop:
        print("interrupted", file=sys.stderr)
        return interruption.status(stop)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"primer-fast sample: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: Options) -> list[str]:
    """The texts, each beginning with the prompt.

    Raises:
        ValueError: a folder that holds no transformer, a prompt that its tokenizer does not know or that is too long.
    """
    for name in ("tokens", "count"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be positive; got {getattr(options, name)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU on this machine")
    device = "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
    model, tokenizer = load(options.run)
    model = model.to(device).eval()
    stops = list(tokenizer.stop_tokens) + (tokenizer.encode("\n")[-1:] if options.line else [])
    prompt = encode_prompt(options.prompt, tokenizer, model.config.context)
    texts = generate(
        model, [torch.tensor(prompt, device=device)] * options.count, max_new_tokens=options.tokens, slide=True,
        temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, stop_tokens=stops,
        seed=options.seed,
    )  # fmt: skip
    written = (row.tolist() for row in texts.completions())
    return [options.prompt + tokenizer.decode(i for i in row if i not in stops) for row in written]


def encode_prompt(prompt: str, tokenizer: Tokenizer, context: int) -> list[int]:
    """The tokens of ``prompt``; where it is empty, what stands before a text: a stop token, a line end, or token 0."""
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
    try:
        return tokenizer.encode("\n")[-1:]
    except ValueError:
        return [0]


def load(folder: Path) -> tuple[Transformer, Tokenizer]:
    """Model and tokenizer of a run, finished or with a checkpoint, or of a Hugging Face GPT-2 folder.

    Raises:
        ValueError: neither of these; the message names the file and says what is wrong.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; it should be that of a run of `primer-fast train gpt`")
    shape = folder / SHAPE
    if not shape.exists():
        config = folder / "config.json"
        if config.is_file() and "model_type" in config.read_text(encoding="utf-8", errors="replace"):
            return load_gpt2(folder), tokenizers.load(folder / TOKENIZER)
        raise ValueError(f"{folder}: not the folder of a run of `primer-fast train gpt`: it has no {shape.name}")
    model = Transformer(read_shape(shape))
    run = RunFolder(folder, "train gpt")
    file: Path | None
    if run.weights.exists():
        file, (tensors, _) = run.weights, read_safetensors(run.weights)
    elif (file := checkpoint.last(run)) is not None:
        tensors, _ = checkpoint.load(file)
        tensors = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    else:
        raise ValueError(f"{folder}: no weights yet: the run has neither {run.weights.name} nor {run.checkpoint.name}")
    load_weights(model, tensors, f"{file}: not the weights of the transformer in {shape.name}")
    tokenizer = tokenizers.load(folder / TOKENIZER)
    if tokenizer.vocab_size > model.config.vocab:
        raise ValueError(
            f"{folder / TOKENIZER}: must have at most the model's {model.config.vocab} tokens; "
            f"got {tokenizer.vocab_size}"
        )
    return model, tokenizer
