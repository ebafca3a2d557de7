"""primer-fast align: a language model learns what people prefer, by PPO and by DPO, on words or on your texts."""

from primer_fast.cli import threads  # noqa: F401

# isort: split

import argparse
import dataclasses
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro

from primer_fast.cli import align_data, align_folder, align_plots, align_report
from primer_fast.cli.align_data import Material
from primer_fast.cli.align_stages import Result, align
from primer_fast.cli.console import Display
from primer_fast.cli.errors import one_line, sizes_that_fit
from primer_fast.cli.option_types import misfit
from primer_fast.cli.run_folder import RunFolder, WriteError, write_text, writing
from primer_fast.data.preferences import load_lexicon, read_preferences, read_ratings
from primer_fast.data.text import load_text
from primer_fast.train.dpo import DPOConfig
from primer_fast.train.language_model import LanguageModelConfig
from primer_fast.train.ppo import PPOConfig
from primer_fast.train.reward import RewardConfig
from primer_fast.train.sft import SFTConfig

LEXICON = "lexicon"
MATERIAL = "material"  # in config.json: what was learned from
PROCEDURES = {
    "language": LanguageModelConfig, "sft": SFTConfig, "reward": RewardConfig, "ppo": PPOConfig, "dpo": DPOConfig
}  # fmt: skip


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
        def must(holds: bool, what: str, got) -> None:
            if not holds:
                raise ValueError(f"--{what}; got {got}")

        must(self.kl_budget > 0, "kl-budget must be positive", self.kl_budget)
        must(self.temperature > 0, "temperature must be positive", self.temperature)
        must(self.samples >= 2, "samples must be 2 or more", self.samples)
        must(0 <= self.seed < 2**63, "seed must be from 0 to 2^63 - 1", self.seed)
        must(self.points >= 1, "points must be 1 or more", self.points)
        must(self.point_samples >= 2, "point-samples must be 2 or more", self.point_samples)
        must(bool(self.betas) and all(b > 0 for b in self.betas), "betas must be positive numbers", self.betas)
        must(self.preferences is None or self.ratings == LEXICON, "preferences excludes --ratings", self.ratings)


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


def main(argv: list[str]) -> int:
    try:
        options = parse(argv)
        with Display() as display:
            with sizes_that_fit():
                result = run(options, display)
            display.print(align_report.summary(result))
            display.print(f"open {(options.out / 'index.html').resolve()}")
        return 0
    except SystemExit as stop:  # tyro has printed the help, or what is wrong with the arguments
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt:
        print("interrupted; --resume goes on, without it the command starts anew", file=sys.stderr)
        return 130
    except (FloatingPointError, WriteError) as error:
        print(f"primer-fast align: {one_line(error)}", file=sys.stderr)
        return 1
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"primer-fast align: {one_line(error)}", file=sys.stderr)
        return 2


def parse(argv: list[str]) -> Options:
    """The options of a call; their defaults depend on what is aligned on."""
    first = argparse.ArgumentParser(prog="primer-fast align", add_help=False, allow_abbrev=False)
    first.add_argument("--ratings", default=LEXICON)
    first.add_argument("--preferences", type=Path)
    first.add_argument("--out", type=Path, default=Options.out)
    first.add_argument("--resume", action="store_true")
    given = first.parse_known_args(argv)[0]
    if given.resume:
        default = began = _from_json(RunFolder(given.out, "align").read_options(), given.out)
    else:
        default, began = default_options(given.ratings, given.preferences), None
    options = tyro.cli(
        Options, args=argv, default=default, prog="primer-fast align", config=(tyro.conf.FlagCreatePairsOff,)
    )
    if began is not None:
        new, old = _to_json(options), _to_json(began)
        other = [f"{key} {old[key]} (now {new[key]})" for key in new if new[key] != old[key]]
        if other:
            raise ValueError(f"{options.out}: the run was begun with {', '.join(other)}; leave them out to go on")
    return options


def _to_json(options: Options) -> dict:
    values = json.loads(json.dumps(dataclasses.asdict(options), default=str))
    return {key: value for key, value in values.items() if key not in ("out", "resume")}


def _from_json(values: dict, out: Path) -> Options:
    """Inverse of ``_to_json``: the options that the run in ``out`` was begun with."""

    def made(cls: type, values: dict):
        if wrong := misfit(cls, values):
            raise ValueError(wrong)
        return cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})

    try:
        values = {key: value for key, value in values.items() if key not in (MATERIAL, "out", "resume")}
        values |= {name: made(cls, values[name]) for name, cls in PROCEDURES.items()}
        if values["preferences"] is not None:
            values["preferences"] = Path(values["preferences"])
        return dataclasses.replace(made(Options, values), out=out)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{out / 'config.json'}: not the configuration of this command ({error})") from error


def load_material(options: Options) -> Material:
    """Errors as the readers of the files raise them."""
    shared: dict[str, Any] = {"held_out": options.held_out, "seed": options.seed}
    texts: dict[str, Any] = {"tokenizer": options.tokenizer, "context": options.context}
    rated: dict[str, Any] = {"pairs": options.pairs, "minimum_gap": options.minimum_gap}
    running_text = None if options.text is None else load_text(options.text)
    source = options.preferences or options.ratings
    if source != LEXICON:
        read: Any = (read_ratings if options.preferences is None else read_preferences)(source)
        try:
            if options.preferences is not None:
                return align_data.pairs(read, running_text, **texts, **shared)
            return align_data.sentences(read, running_text, **texts, **rated, **shared)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
    if options.text is not None:
        raise ValueError("--text is for sentences: give --ratings FILE or --preferences FILE with it")
    return align_data.words(load_lexicon(), **rated, **shared)


def run(options: Options, display: Display) -> Result:
    """Everything, into the folder ``out``.

    Raises:
        ValueError, OSError: what the options name cannot be used; says what and why.
        FloatingPointError: a training diverged.
        WriteError: a file cannot be written.
    """
    began = time.perf_counter()
    torch.manual_seed(options.seed)
    material = load_material(options)
    folder = RunFolder(options.out, "align")
    with folder.held():
        material_now = align_folder.fingerprint(material)
        if options.resume:
            if folder.read_options().get(MATERIAL) != material_now:
                raise ValueError(f"{options.out}: the run was begun with other data than there is now; start anew")
        else:
            if not folder.is_new():
                folder.read_options()  # raises for what is not a run of this command
                align_folder.forget(options.out)
            folder.begin(_to_json(options) | {MATERIAL: material_now}, overwrite=True)
        result = align(material, options, display)
        _report(options, result, began)
    return result


def _report(options: Options, result: Result, began: float) -> None:
    seconds = max(time.perf_counter() - began, sum(result.seconds.values()))  # of all calls, where there were several
    write_text(options.out / "results.json", json.dumps(result.to_json(), indent=2) + "\n")
    with writing(options.out):
        align_plots.draw(options.out, result)
    write_text(options.out / "index.html", align_report.page_of(options.out, result, seconds))
