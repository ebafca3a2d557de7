"""Of `primer-fast align`."""

import argparse
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from primer_fast.cli.option_types import made, must_agree
from primer_fast.train.settings import (
    DPOConfig,
    LanguageModelConfig,
    PPOConfig,
    RewardConfig,
    SFTConfig,
    must,
)

LEXICON = "lexicon"
MATERIAL = "material"  # in config.json: what was learned from


@dataclass(frozen=True)
class Options:
    """Pretrain a small transformer, learn a reward from preferences, align by PPO and by DPO; one page shows it all."""

    ratings: str = LEXICON  # "lexicon": English words that people rated; or a TSV with the columns mean_rating, text
    preferences: Path | None = None  # a JSON Lines file of prompt, chosen, rejected, instead of ratings
    text: str | None = None  # with sentences: text to pretrain on before them, a file, a folder or "builtin"
    out: Path = Path("runs/align")  # folder of the page and of the models; an earlier run in it is replaced
    resume: bool = False  # go on with the run in --out, with the options that it was begun with
    tokenizer: str = "characters"  # of sentences; or "bytes", or a JSON file of Hugging Face's tokenizers
    context: int = 96  # tokens of a prompt and its completion; words take what they need
    width: int = 96
    layers: int = 3
    heads: int = 4
    pairs: int = 20_000  # preference pairs that are made of the ratings
    minimum_gap: float = 1.0  # by how much the ratings of a pair differ at least
    held_out: float = 0.15  # share of the texts that no preference is learned from
    temperature: float = 1.0  # of every policy, in training and wherever it is measured
    kl_budget: float = 4.0  # nats per completion: how far from the pretrained policy a policy may move
    samples: int = 4000  # completions that each policy is measured by at the end
    points: int = 8  # times that a policy is measured on its way
    point_samples: int = 500  # completions of each of these measurements
    betas: tuple[float, ...] = (0.1, 0.3, 1.0)  # of DPO: a policy for each
    seed: int = 0
    language: LanguageModelConfig = field(  # pretraining on --text
        default_factory=lambda: LanguageModelConfig(
            steps=300, batch_size=32, warmup_steps=30, eval_every=100, eval_batches=10
        )
    )
    sft: SFTConfig = field(  # pretraining on the completions, without their ratings
        default_factory=lambda: SFTConfig(lr=3e-3, min_lr=1e-4, batch_size=128, epochs=16, warmup_steps=50)
    )
    reward: RewardConfig = field(
        default_factory=lambda: RewardConfig(lr=1e-3, batch_size=128, steps=200, centring=0.01, weight_decay=0.1)
    )
    ppo: PPOConfig = field(
        default_factory=lambda: PPOConfig(
            steps=50, batch_size=256, minibatches=2, epochs=2, kl_coefficient=0.4, lr=3e-4, value_weight=0.5,
            value_clip=1.0, missing_end_penalty=1.0, warmup_steps=3,
        )
    )  # fmt: skip
    dpo: DPOConfig = field(  # its beta is each of --betas
        default_factory=lambda: DPOConfig(lr=1e-4, batch_size=128, epochs=1, warmup_steps=10)
    )

    def __post_init__(self):
        must(self.kl_budget > 0, "--kl-budget must be positive", self.kl_budget)
        must(1e-30 <= self.temperature <= 1e30, "--temperature must be from 1e-30 to 1e30", self.temperature)
        must(self.samples >= 2, "--samples must be 2 or more", self.samples)
        must(0 <= self.seed < 2**63, "--seed must be from 0 to 2^63 - 1", self.seed)
        must(self.points >= 1, "--points must be 1 or more", self.points)
        must(self.point_samples >= 2, "--point-samples must be 2 or more", self.point_samples)
        must(bool(self.betas) and all(b > 0 for b in self.betas), "--betas must be positive numbers", self.betas)
        must(self.preferences is None or self.ratings == LEXICON, "--preferences excludes --ratings", self.ratings)


def default_options(ratings: str = LEXICON, preferences: Path | None = None) -> Options:
    """Settings that take some minutes on two cores."""
    words = Options()
    if ratings == LEXICON and preferences is None:
        return words
    return dataclasses.replace(
        words, ratings=ratings, preferences=preferences, minimum_gap=1.5, samples=500, points=4, point_samples=100,
        betas=(0.3,),
        language=dataclasses.replace(words.language, lr=3e-3, steps=600, batch_size=16),
        sft=dataclasses.replace(words.sft, lr=2e-3, steps=1200, batch_size=16),
        reward=dataclasses.replace(words.reward, batch_size=64, steps=300),
        # more tokens, more KL a step; cut sentences do not end
        ppo=dataclasses.replace(words.ppo, steps=30, batch_size=64, lr=1e-4, missing_end_penalty=0.0),
        dpo=dataclasses.replace(words.dpo, batch_size=32, steps=120),
    )  # fmt: skip


def parse(argv: list[str]) -> Options:
    """The options of a call; their defaults depend on what is aligned on."""
    first = argparse.ArgumentParser(prog="primer-fast align", add_help=False, allow_abbrev=False)
    first.add_argument("--ratings", default=LEXICON)
    first.add_argument("--preferences", type=Path)
    first.add_argument("--out", type=Path, default=Options.out)
    first.add_argument("--resume", action="store_true")
    given = first.parse_known_args(argv)[0]
    if given.resume:
        from primer_fast.cli.run.folder import RunFolder  # which needs torch

        default = began = _from_json(RunFolder(given.out, "align").read_options(), given.out)
    else:
        default, began = default_options(given.ratings, given.preferences), None
    options = tyro.cli(
        Options, args=argv, default=default, prog="primer-fast align", config=(tyro.conf.FlagCreatePairsOff,)
    )
    if began is not None:
        must_agree(options.out, to_json(options), to_json(began))
    return options


def to_json(options: Options) -> dict:
    values = json.loads(json.dumps(dataclasses.asdict(options), default=str))
    return {key: value for key, value in values.items() if key not in ("out", "resume")}


def _from_json(values: dict, out: Path) -> Options:
    """Inverse of ``to_json``: the options that the run in ``out`` was begun with."""
    try:
        values = {key: value for key, value in values.items() if key not in (MATERIAL, "out", "resume")}
        if values["preferences"] is not None:
            values["preferences"] = Path(values["preferences"])
        return dataclasses.replace(made(Options, values), out=out)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{out / 'config.json'}: not the configuration of this command ({error})") from error
