"""What the commands that train on preferences share of their options."""

from dataclasses import dataclass

from primer_fast.cli.options.training import TrainOptions


@dataclass(frozen=True, kw_only=True)
class PairOptions(TrainOptions):
    """Options of the commands that train on preferences."""

    data: str  # a JSON Lines file of prompt, chosen, rejected; a TSV of mean_rating, text; or "lexicon": rated words
    model: str  # folder of a finished run of `train gpt` or `train sft`, or a Hugging Face GPT-2 checkpoint's
    held_out: float = 0.1  # share of the texts to measure by at the end; of a JSON Lines file, of the pairs
    pairs: int = 20_000  # that are made of rated texts
    minimum_gap: float = 1.0  # by how much the ratings of a pair differ at least

    def __post_init__(self):
        if not 0 < self.held_out < 1:
            raise ValueError(f"--held-out must be between 0 and 1; got {self.held_out}")
