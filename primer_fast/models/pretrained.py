"""Weights of `transformers`' GPT-2 and BERT checkpoints, read from safetensors files; no pickle is ever opened."""

__all__ = [
    "ACTIVATIONS",
    "gpt2_shape",
    "load_bert",
    "load_gpt2",
]

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from primer_fast.models.transformer import Transformer, TransformerConfig

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def load_gpt2(path: str | Path, *, dropout: float = 0.0) -> Transformer:
    """The float32 decoder of a GPT-2 checkpoint (GPT2LMHeadModel or GPT2Model), in training mode as any new module.

    Args:
        path: a folder with config.json and model.safetensors, or shards and their index; or one .safetensors file
            with config.json beside it.
        dropout: for fine-tuning, everywhere; the checkpoint's own rates are not taken over.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a tensor is missing, unexpected or of another shape, or the configuration asks for what
            ``Transformer`` does not have; names file and key.
        ImportError: the safetensors package is missing.
    """
    checkpoint = _Checkpoint("load_gpt2", Path(path))
    config = gpt2_shape(path, dropout=dropout)
    names = {"embedding.weight": "wte.weight", "positions": "wpe.weight", **_pair("norm", "ln_f")}
    for i in range(config.layers):
        ours, theirs = f"blocks.{i}", f"h.{i}"
        names |= _pair(f"{ours}.attention_norm", f"{theirs}.ln_1") | _pair(f"{ours}.mlp_norm", f"{theirs}.ln_2")
        names |= _pair(f"{ours}.attention.qkv", f"{theirs}.attn.c_attn")
        names |= _pair(f"{ours}.attention.out", f"{theirs}.attn.c_proj")
        names |= _pair(f"{ours}.up", f"{theirs}.mlp.c_fc") | _pair(f"{ours}.down", f"{theirs}.mlp.c_proj")
    ignored = [r"h\.\d+\.attn\.(masked_)?bias"]
    if config.tied:
        ignored.append(r"lm_head\.weight")
    else:
        names["unembedding.weight"] = "lm_head.weight"
    return checkpoint.fill(config, names, ignored, prefix="transformer.", transposed=r"\.c_(attn|proj|fc)\.weight$")


def gpt2_shape(path: str | Path, *, dropout: float = 0.0) -> TransformerConfig:
    """The shape of what ``load_gpt2`` makes of a path, from its config.json alone. Errors as there."""
    path = Path(path)
    settings = _Settings("load_gpt2", (path if path.is_dir() else path.parent) / CONFIG, "gpt2")
    settings.refuse(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    return settings.build(
        vocab=settings["vocab_size"],
        context=settings["n_positions"],
        width=settings["n_embd"],
        layers=settings["n_layer"],
        heads=settings["n_head"],
        mlp_width=settings.get("n_inner", None),
        activation=settings.activation("activation_function", "gelu_new"),
        tied=settings.get("tie_word_embeddings", True),
        norm_eps=settings.get("layer_norm_epsilon", 1e-5),
        norm="pre",
        positions="learned",
        dropout=dropout,
    )


def load_bert(path: str | Path, *, dropout: float = 0.0) -> Transformer:
    """The float32 encoder of a BERT checkpoint: BertModel, or BertForMaskedLM and BertForPreTraining with their head.

    ``hidden`` gives BERT's last hidden state and, where the checkpoint has the masked-language head, ``forward`` its
    logits; without that head ``forward`` multiplies by the transposed embedding. The pooler and the next-sentence head
    are left out. Old checkpoints name a norm's parameters gamma and beta. Arguments and errors as ``load_gpt2``.
    """
    checkpoint = _Checkpoint("load_bert", Path(path))
    settings = _Settings("load_bert", checkpoint.config_file, "bert")
    settings.refuse(is_decoder=False, add_cross_attention=False, position_embedding_type="absolute")
    checkpoint.rename([(r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")])
    head = any(key.startswith("cls.predictions.transform") for key in checkpoint.tensors)
    tied = not head or settings.get("tie_word_embeddings", True)
    config = settings.build(
        vocab=settings["vocab_size"],
        context=settings["max_position_embeddings"],
        width=settings["hidden_size"],
        layers=settings["num_hidden_layers"],
        heads=settings["num_attention_heads"],
        mlp_width=settings["intermediate_size"],
        activation=settings.activation("hidden_act", "gelu"),
        segments=settings.get("type_vocab_size", 2),
        norm_eps=settings.get("layer_norm_eps", 1e-12),
        norm="post",
        positions="learned",
        causal=False,
        embedding_norm=True,
        head_transform=head,
        head_bias=head,
        tied=tied,
        dropout=dropout,
    )
    names = {
        "embedding.weight": "embeddings.word_embeddings.weight",
        "positions": "embeddings.position_embeddings.weight",
        "segments.weight": "embeddings.token_type_embeddings.weight",
        **_pair("embedding_norm", "embeddings.LayerNorm"),
    }
    for i in range(config.layers):
        ours, theirs = f"blocks.{i}", f"encoder.layer.{i}"
        for kind in ("weight", "bias"):
            parts = [f"{theirs}.attention.self.{part}.{kind}" for part in ("query", "key", "value")]
            names[f"{ours}.attention.qkv.{kind}"] = parts
        names |= _pair(f"{ours}.attention.out", f"{theirs}.attention.output.dense")
        names |= _pair(f"{ours}.attention_norm", f"{theirs}.attention.output.LayerNorm")
        names |= _pair(f"{ours}.up", f"{theirs}.intermediate.dense") | _pair(f"{ours}.down", f"{theirs}.output.dense")
        names |= _pair(f"{ours}.mlp_norm", f"{theirs}.output.LayerNorm")
    ignored = [r"pooler\.dense\.(weight|bias)", r"cls\.seq_relationship\.(weight|bias)", r"embeddings\.position_ids"]
    if head:
        names |= _pair("head", "cls.predictions.transform.dense")
        names |= _pair("head_norm", "cls.predictions.transform.LayerNorm")
        decoder = "cls.predictions.decoder"
        own_bias = not tied and f"{decoder}.bias" in checkpoint.tensors  # otherwise both names are of one tensor
        names["head_bias"] = f"{decoder}.bias" if own_bias else "cls.predictions.bias"
        if not tied:
            names["unembedding.weight"] = f"{decoder}.weight"
        ignored.append(r"cls\.predictions\.(decoder\.(weight|bias)|bias)")
    return checkpoint.fill(config, names, ignored, prefix="bert.")


def _pair(ours, theirs):
    return {f"{ours}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias")}


class _Settings:
    """config.json."""

    def __init__(self, op: str, file: Path, model_type: str):
        self.where, self.values = f"{op}: {file}", _json(op, file)
        self.refuse(model_type=model_type)

    def __getitem__(self, key):
        if key not in self.values:
            raise ValueError(f"{self.where}: {key} must be given; got {', '.join(sorted(self.values))}")
        return self.values[key]

    def get(self, key, default):
        return self.values.get(key, default)

    def refuse(self, **supported):
        for key, value in supported.items():
            if self.get(key, value) != value:
                raise ValueError(f"{self.where}: {key} must be {value!r}; got {self.values[key]!r}")

    def activation(self, key, default):
        name = self.get(key, default)
        if name not in ACTIVATIONS:
            raise ValueError(f"{self.where}: {key} must be one of {', '.join(ACTIVATIONS)}; got {name!r}")
        return ACTIVATIONS[name]

    def build(self, **fields) -> TransformerConfig:
        try:
            return TransformerConfig(**fields)
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from None


@dataclass
class _Stored:
    file: Path
    key: str  # as the file spells it
    read: Any  # an open safetensors file


class _Checkpoint:
    """The tensors of one or more safetensors files by name; they are read one at a time."""

    def __init__(self, op: str, path: Path):
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError as error:
            raise ImportError(f"{op} needs safetensors: pip install 'primer-fast[cli]'") from error
        self.op, self.path = op, path
        folder = path if path.is_dir() else path.parent
        self.config_file = folder / CONFIG
        self.tensors: dict[str, _Stored] = {}
        for file in self._files(path):
            if not file.is_file():
                raise FileNotFoundError(f"{op}: {file} is missing")
            try:
                opened = safe_open(str(file), framework="pt")
                self.tensors |= {key: _Stored(file, key, opened) for key in opened.keys()}  # noqa: SIM118
            except SafetensorError as error:
                raise ValueError(f"{op}: {file} must be a safetensors file; got {error}") from error

    def _files(self, path):
        if not path.is_dir():
            return [path]
        if (path / WEIGHTS).is_file() or not (path / INDEX).is_file():
            if not (path / WEIGHTS).is_file():
                hint = " (a .bin file is a pickle, which is not opened)" if list(path.glob("*.bin")) else ""
                raise FileNotFoundError(f"{self.op}: {path} must hold {WEIGHTS} or {INDEX}; got neither{hint}")
            return [path / WEIGHTS]
        index = _json(self.op, path / INDEX).get("weight_map")
        names = list(index.values()) if isinstance(index, dict) else []
        if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
            got = names[:3] if isinstance(index, dict) else type(index).__name__
            raise ValueError(f"{self.op}: {path / INDEX}: weight_map must name files of the folder; got {got}")
        return [path / name for name in sorted(set(names))]

    def rename(self, patterns):
        for pattern, new in patterns:
            self.tensors = {re.sub(pattern, new, key): stored for key, stored in self.tensors.items()}

    def fill(self, config, names, ignored, *, prefix, transposed=None) -> Transformer:
        """The model of ``config`` with the tensors that ``names`` gives for each parameter."""
        self.rename([(f"^{re.escape(prefix)}", "")])
        wanted = {key for keys in names.values() for key in ([keys] if isinstance(keys, str) else keys)}
        extra = [key for key in self.tensors if key not in wanted and not any(re.fullmatch(p, key) for p in ignored)]
        for what, keys in (("missing", wanted - self.tensors.keys()), ("unexpected", extra)):
            if keys:
                keys = sorted(keys)
                more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
                raise ValueError(f"{self.op}: {self.path}: {what} tensors: {', '.join(keys[:8])}{more}")
        with torch.device("meta"):
            model = Transformer(config)
        model.to_empty(device="cpu")  # every parameter is filled below, and nothing is drawn before
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                keys = names[name]
                parts = [keys] if isinstance(keys, str) else keys
                for key, part in zip(parts, parameter.chunk(len(parts)), strict=True):
                    flip = transposed is not None and re.search(transposed, key) is not None
                    part.copy_(self._read(key, part.mT if flip else part, flip))
        return model

    def _read(self, key, like, flip) -> Tensor:
        stored = self.tensors[key]
        shape = tuple(stored.read.get_slice(stored.key).get_shape())
        if shape != tuple(like.shape):
            raise ValueError(f"{self.op}: {stored.file}: {stored.key} must be {tuple(like.shape)}; got {shape}")
        tensor = stored.read.get_tensor(stored.key)
        return tensor.mT if flip else tensor


def _json(op, file):
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{op}: {file} is missing") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{op}: {file} must be JSON; got {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{op}: {file} must hold an object; got {type(values).__name__}")
    return values
