"""Of `primer-fast train sft`, `reward`, `dpo` and `ppo`: the procedures on completions."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from primer_fast.cli.options.train.training import Syntax, TrainOptions
from primer_fast.train.settings import DPOConfig, PPOConfig, RewardConfig, SFTConfig


@dataclass(frozen=True, kw_only=True)
class HeldOutOptions(TrainOptions):
    """Options of the commands that measure on a part of their data at the end."""

    model: str
    held_out: float = 0.1

    def __post_init__(self):
        if not 0 < self.held_out < 1:
            raise ValueError(f"--held-out must be between 0 and 1; got {self.held_out}")


@dataclass(frozen=True, kw_only=True)
class SFTOptions(HeldOutOptions):
    """Fine-tune a transformer on completions; metrics, checkpoint, weights, curves and samples go to a folder."""

    data: str  # a JSON Lines file of prompt, completion; or of prompt, chosen, rejected: the chosen ones are learned
    model: str  # folder of a finished run of `train gpt` or of this command, or a Hugging Face GPT-2 checkpoint's
    train: Annotated[SFTConfig, tyro.conf.arg(name="")]
    held_out: float = 0.1  # share of the completions to measure the loss on at the end


@dataclass(frozen=True, kw_only=True)
class PairOptions(HeldOutOptions):
    """Options of the commands that train on preferences."""

    data: str  # a JSON Lines file of prompt, chosen, rejected; a TSV of mean_rating, text; or "lexicon": rated words
    model: str  # folder of a finished run of `train gpt` or `train sft`, or a Hugging Face GPT-2 checkpoint's
    held_out: float = 0.1  # share of the texts to measure by at the end; of a JSON Lines file, of the pairs
    pairs: int = 20_000  # that are made of rated texts
    minimum_gap: float = 1.0  # by how much the ratings of a pair differ at least


@dataclass(frozen=True, kw_only=True)
class RewardOptions(PairOptions):
    """Train a reward model on preferences; metrics, checkpoint, weights, curves and scored texts go to a folder."""

    train: Annotated[RewardConfig, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class DPOOptions(PairOptions):
    """Direct preference optimisation; metrics, checkpoint, weights, curves and samples go to a folder."""

    train: Annotated[DPOConfig, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class PPOOptions(TrainOptions):
    """Proximal policy optimisation; metrics, checkpoint, weights, curves and samples go to a folder."""

    data: Annotated[
        str, tyro.conf.arg(name="prompts")
    ]  # a text file of a prompt a line, or a .jsonl with "prompt" in each
    model: str  # folder of a finished run of `train gpt` or `train sft`, or a Hugging Face GPT-2 checkpoint's
    reward: str  # folder of a run of `train reward`; or module:function, (prompts, completions) -> a number for each
    train: Annotated[PPOConfig, tyro.conf.arg(name="")]
    shared_critic: bool = False  # the critic reads the policy's trunk instead of one of its own


def _syntax(name: str, options: type[TrainOptions], train, *, data_option: str = "data", **given) -> Syntax:
    def default_options(data: str) -> TrainOptions:
        return options(data=data, model=tyro.MISSING, train=train, **given)  # type: ignore[call-arg]

    return Syntax(name, options, default_options, data_option=data_option)


SFT = _syntax("sft", SFTOptions, SFTConfig(lr=3e-4, min_lr=3e-5))
REWARD = _syntax("reward", RewardOptions, RewardConfig())
DPO = _syntax("dpo", DPOOptions, DPOConfig(lr=1e-5))
PPO = _syntax("ppo", PPOOptions, PPOConfig(), data_option="prompts", reward=tyro.MISSING)
