"""What a command takes from earlier runs: a transformer with its tokenizer, a reward."""

import importlib
import sys
from pathlib import Path

from primer_fast.cli.run import checkpoint
from primer_fast.cli.run.folder import RunFolder, load_weights, read_safetensors
from primer_fast.cli.train.gpt_tasks import SHAPE, TOKENIZER, read_shape
from primer_fast.data import tokenizers
from primer_fast.data.tokenizers import Tokenizer
from primer_fast.models.pretrained import load_gpt2
from primer_fast.models.reward import RewardModel
from primer_fast.models.transformer import Transformer
from primer_fast.train.scoring import Reward, reward_of_lists, reward_of_model


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
            return _matched(load_gpt2(folder), folder / TOKENIZER)
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
    return _matched(model, folder / TOKENIZER)


def _matched(model: Transformer, file: Path) -> tuple[Transformer, Tokenizer]:
    """The model and the tokenizer in ``file``; the model never draws an id for which the tokenizer has no token."""
    tokenizer = tokenizers.load(file)
    try:
        model.exclude(tokenizers.without_token(tokenizer, model.config.vocab))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return model, tokenizer


def load_policy(folder: str) -> tuple[Transformer, Tokenizer, int]:
    """A causal transformer of a run, its tokenizer, and the token that ends a completion.

    Raises:
        ValueError: not the folder of such a run.
    """
    model, tokenizer = load(Path(folder))
    if not model.config.causal:
        raise ValueError(f"--model {folder}: must be a decoder; got a transformer that sees what follows")
    return model, tokenizer, end_token(tokenizer)


def end_token(tokenizer: Tokenizer) -> int:
    """The tokenizer's own end-of-text token, else its line end."""
    if tokenizer.stop_tokens:
        return tokenizer.stop_tokens[0]
    end = tokenizers.line_end(tokenizer)
    if end is None:
        raise ValueError("the model's tokenizer must know a token that ends a text, or the line end")
    return end


def load_reward(source: str, tokenizer: Tokenizer) -> Reward:
    """A reward from the folder of a reward model, or from ``module:function``: (prompts, completions) -> numbers.

    The function gets two lists of texts, without the end token; the module may lie in the current folder.

    Raises:
        ValueError: neither of these, or a reward model of another tokenizer.
    """
    if Path(source).is_dir():
        return reward_of_model(load_reward_model(Path(source), tokenizer))
    module, separator, name = source.partition(":")
    if not separator or not module or not name:
        raise ValueError(f"--reward must be the folder of a reward model or module:function; got {source!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--reward {source}: {error}") from error
    except (Exception, SystemExit) as error:  # the module is the user's
        raise ValueError(f"--reward {source}: importing it raised {type(error).__name__}: {error}") from error
    if not callable(function):
        raise ValueError(f"--reward {source}: must be a function; got {type(function).__name__}")
    end = end_token(tokenizer)
    return reward_of_lists(function, lambda ids: tokenizer.decode(i for i in ids if i != end))


def load_reward_model(folder: Path, tokenizer: Tokenizer) -> RewardModel:
    """The reward model in a folder; raises ValueError as ``load_reward`` does."""
    try:
        model = RewardModel(read_shape(folder / SHAPE))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: not the folder of a reward model ({error})") from error
    theirs = tokenizers.load(folder / TOKENIZER)
    if theirs.to_json() != tokenizer.to_json():
        raise ValueError(f"{folder}: the reward model must have the policy's tokenizer; got another one")
    try:
        tokenizers.check_fits(theirs, model.config.vocab)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    tensors, _ = read_safetensors(folder / "model.safetensors")
    load_weights(model, tensors, f"{folder}: not the weights of a reward model")
    return model.eval().requires_grad_(False)
