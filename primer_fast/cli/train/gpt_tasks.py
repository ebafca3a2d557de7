"""Text that a transformer is trained on, and the pictures and the sample of what it has learned."""

import dataclasses
import json
import textwrap
from pathlib import Path

import torch
from torch import Tensor

from primer_fast.cli.run.folder import write_text
from primer_fast.cli.run.tasks import Task
from primer_fast.cli.train import gpt_plots
from primer_fast.data.text import TokenizedText
from primer_fast.data.tokenizers import Tokenizer, line_end, without_token
from primer_fast.models.generation import generate
from primer_fast.models.transformer import Transformer, TransformerConfig
from primer_fast.train import language_model

SHAPE, TOKENIZER = "transformer.json", "tokenizer.json"  # files of a run
FINAL_BATCHES = 1000  # of the last validation, where the held-out text has more
SENTENCE = 24  # tokens whose attention is drawn
LABELLED = 150  # the most tokens in the picture of the embeddings


class TextTask(Task):
    """One text as tokens; ``sample_tokens`` is how much the model writes after each validation, with ``seed``."""

    def __init__(self, text: TokenizedText, tokenizer: Tokenizer, *, context: int, sample_tokens: int, seed: int):
        self.text, self.tokenizer, self.context = text, tokenizer, context
        self.sample_tokens, self.seed = sample_tokens, seed

    def steps(self, config):
        return config.steps

    def epoch(self, step, config):
        return step * config.batch_size * self.context / len(self.text.train)  # tokens seen, some of them twice

    def is_saved(self, step, config):
        return language_model.is_validated(step, config)

    def train(self, state, config, should_stop):
        return language_model.train(state, self.text, config, should_stop=should_stop)

    def files(self, model):
        shape = json.dumps(dataclasses.asdict(model.config), indent=2) + "\n"
        return {SHAPE: shape, TOKENIZER: self.tokenizer.to_json()}

    def remark(self, model, row):
        if "validation/loss" not in row or self.sample_tokens == 0:
            return None
        sample = textwrap.indent(self.sample(model, self.sample_tokens), "    ", lambda line: True)
        return f"step {row['step']}: validation loss {row['validation/loss']:.4f}; it writes\n{sample}"

    def describe(self, model, config):
        tokens = self.text.validation
        batches = None
        if len(tokens) > FINAL_BATCHES * config.batch_size * model.config.context:
            batches = FINAL_BATCHES
        loss = language_model.evaluate(model, tokens, config, batches)
        of = f"{len(tokens):,} held-out {self.tokenizer.unit}s" + (f", {batches} batches of them" if batches else "")
        return f"validation loss {loss:.4f} nats per {self.tokenizer.unit} ({of})"

    def sample(self, model: Transformer, count: int) -> str:
        """``count`` tokens that the model writes, the same whenever its weights are the same."""
        start = self.beginning().to(next(model.parameters()).device)
        written = generate(
            model, [start], max_new_tokens=count, temperature=0.8, seed=self.seed, slide=True,
            stop_tokens=self.tokenizer.stop_tokens,
        )  # fmt: skip
        return self.tokenizer.decode(written.completions()[0].tolist())

    def beginning(self) -> Tensor:  # (1,)
        """What stands before a text: the token that ends the one before, or a line end, or whatever comes first."""
        if self.tokenizer.stop_tokens:
            return torch.tensor(self.tokenizer.stop_tokens[:1])
        end = line_end(self.tokenizer)
        return self.text.train[:1].long() if end is None else torch.tensor([end])

    def draw(self, folder, model, config, rows):
        model.eval()
        unit, shape = self.tokenizer.unit, model.config
        title = f"Transformer of {shape.layers} layers, {shape.heads} heads, width {shape.width}"
        gpt_plots.curves(folder / "curves.png", rows, f"{title}, on {len(self.text.train):,} {unit}s", unit)
        tokens = self.sentence(min(SENTENCE, shape.context))
        maps = model.attention_weights(tokens[None].to(next(model.parameters()).device))
        weights = [layer[0].float().cpu().numpy() for layer in maps]
        gpt_plots.attention(folder / "attention.png", weights, self.names(tokens), "Where each head looks")
        positions = model.positions.detach().float().cpu().numpy()
        gpt_plots.positions(folder / "positions.png", positions, shape.positions)
        count = torch.bincount(self.text.train.int(), minlength=shape.vocab)
        count[without_token(self.tokenizer, shape.vocab)] = -1
        common = count.argsort(descending=True, stable=True)[: min(LABELLED, int((count >= 0).sum()))]
        rows_of_tokens = model.embedding.weight.detach().float().cpu()[common].numpy()
        gpt_plots.embeddings(folder / "embeddings.png", rows_of_tokens, self.names(common), unit)
        write_text(folder / "sample.txt", self.sample(model, 500) + "\n")
        return ["curves.png", "attention.png", "positions.png", "embeddings.png", "sample.txt"]

    def sentence(self, length: int) -> Tensor:  # (length,) int64
        """The part of the first tokens held out, 4,000 of them, with the fewest repeated in a row or of white space."""
        tokens = self.text.validation[:4000].long()
        blank = torch.tensor([not self.tokenizer.decode([i]).strip() for i in tokens.tolist()])
        dull = blank.clone()
        dull[1:] &= blank[:-1]  # one space between words is none
        dull[1:] |= tokens[1:] == tokens[:-1]
        counts = dull.int().unfold(0, length, 1).sum(dim=1) + blank[: len(tokens) - length + 1].int()
        start = int(counts.argmin())
        return tokens[start : start + length]

    def names(self, tokens: Tensor) -> list[str]:  # (N,)
        """Each token as it is written, with signs for what is not seen."""
        return [gpt_plots.visible(self.tokenizer.decode([i])) for i in tokens.tolist()]


def read_shape(path: Path) -> TransformerConfig:
    """The transformer.json of a run; ValueError, which names it, if it is not what ``TextTask.files`` writes."""
    try:
        return TransformerConfig(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not the shape of a transformer, or damaged ({error})") from error
