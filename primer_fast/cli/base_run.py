"""What a procedure on completions starts from: a policy and its tokenizer, a reward, both of finished runs."""

import importlib
import json
import sys
from pathlib import Path

from primer_fast.cli.run_folder import load_weights, read_safetensors
from primer_fast.cli.sample import load
from primer_fast.data import tokenizers
from primer_fast.data.tokenizers import Tokenizer
from primer_fast.models.reward import RewardModel
from primer_fast.models.transformer import Transformer, TransformerConfig
from primer_fast.train.scoring import Reward, reward_of_lists, reward_of_model


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
    """Errors as ``load_reward``."""
    try:
        shape = TransformerConfig(**json.loads((folder / "transformer.json").read_text(encoding="utf-8")))
        model = RewardModel(shape)
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder}: not the folder of a reward model ({error})") from error
    theirs = tokenizers.load(folder / "tokenizer.json")
    if theirs.to_json() != tokenizer.to_json():
        raise ValueError(f"{folder}: the reward model must have the policy's tokenizer; got another one")
    try:
        tokenizers.check_fits(theirs, shape.vocab)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    tensors, _ = read_safetensors(folder / "model.safetensors")
    load_weights(model, tensors, f"{folder}: not the weights of a reward model")
    return model.eval().requires_grad_(False)
