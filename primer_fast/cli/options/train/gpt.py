"""Of `primer-fast train gpt`."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from primer_fast.cli.options.train.training import Syntax, TrainOptions
from primer_fast.train.settings import LanguageModelConfig

Preset = Literal["primer", "nanogpt-cpu", "gpt2"]


@dataclass(frozen=True)
class Options(TrainOptions):
    """Train a transformer on text; metrics, checkpoint, weights, tokenizer, pictures and a sample go to a folder."""

    data: str  # a UTF-8 text file, a folder of .md, .rst, .txt files, or "builtin": Python's language reference
    train: Annotated[LanguageModelConfig, tyro.conf.arg(name="")]
    preset: Preset = "primer"  # what the other options are where they are not given
    init_from: str | None = None  # folder of a Hugging Face GPT-2 checkpoint to begin with: weights, shape, tokenizer
    tokenizer: str = "characters"  # "characters" (of the text), "bytes", or a JSON file of Hugging Face's tokenizers
    context: int = 64  # tokens of a window: what a token can look back on
    width: int = 128  # numbers that stand for a token between the layers
    layers: int = 4
    heads: int = 4  # of each layer's attention
    kv_heads: int | None = None  # heads of keys and values, each shared by heads / kv_heads queries; None: heads
    mlp_width: int | None = None  # hidden units of each layer's perceptron; None: 4 x width
    activation: Literal["gelu", "gelu_tanh", "relu"] = "gelu"  # of the perceptron
    norm: Literal["post", "pre"] = "post"  # post: LayerNorm(O + X); pre: X + O(LayerNorm(X))
    positions: Literal["sinusoidal", "learned"] = "sinusoidal"
    dropout: float = 0.0  # of the embedding, the attention's weights and the residual branches
    bias: bool = True  # a bias in the linear layers and the norms
    tied: bool = True  # logits through the transposed embedding
    sample_tokens: int = 200  # how much the model writes after each validation; 0: nothing

    def __post_init__(self):
        if self.sample_tokens < 0:
            raise ValueError(f"--sample-tokens must not be negative; got {self.sample_tokens}")


OF_THE_MODEL = (  # the options that are TransformerConfig's
    "context", "width", "layers", "heads", "kv_heads", "mlp_width", "activation", "norm", "positions", "dropout",
    "bias", "tied",
)  # fmt: skip
PRESETS: dict[Preset, dict[str, Any]] = {
    "primer": {"train": LanguageModelConfig(warmup_steps=200)},  # post-LN needs the longer warm-up
    "nanogpt-cpu": {"train": LanguageModelConfig(), "norm": "pre", "positions": "learned"},
    "gpt2": {  # the 124M shape, with nanoGPT's settings for it
        "train": LanguageModelConfig(
            lr=6e-4, min_lr=6e-5, warmup_steps=2000, steps=600_000, batch_size=480, accumulate=40, betas=(0.9, 0.95),
            precision="bfloat16", eval_every=1000, eval_batches=5,
        ),
        "tokenizer": "bytes", "context": 1024, "width": 768, "layers": 12, "heads": 12, "activation": "gelu_tanh",
        "norm": "pre", "positions": "learned",
    },
}  # fmt: skip
FINE_TUNING = LanguageModelConfig(lr=3e-5, min_lr=3e-6, steps=500, batch_size=8, eval_every=100)


def default_options(data: str, preset: Preset = "primer", init_from: str | None = None) -> Options:
    """The settings of a preset, or those of a checkpoint to begin with."""
    if preset not in PRESETS:
        raise ValueError(f"--preset must be one of {', '.join(PRESETS)}; got {preset!r}")
    if init_from is None:
        return Options(data, preset=preset, **PRESETS[preset])
    from primer_fast.models.pretrained import load_gpt2  # which needs torch

    shape = dataclasses.asdict(load_gpt2(init_from).config)
    return Options(
        data, FINE_TUNING, preset=preset, init_from=init_from, tokenizer=f"{init_from}/tokenizer.json",
        **{name: shape[name] for name in OF_THE_MODEL},
    )  # fmt: skip


SYNTAX = Syntax("gpt", Options, default_options, depends_on=("preset", "init_from"))
parse = SYNTAX.parse
