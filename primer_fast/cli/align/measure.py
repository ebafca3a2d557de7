"""What a policy writes and what that is worth: reward, KL to the policy before, human ratings where they are known."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from primer_fast.cli.align.data import Material
from primer_fast.data.completions import Completions
from primer_fast.models.generation import generate
from primer_fast.models.reward import RewardModel
from primer_fast.models.transformer import Transformer
from primer_fast.train.log_probs import token_log_probs
from primer_fast.train.reward import score
from primer_fast.train.state import generator

Z = 1.959964  # of a 95 % interval
BATCH = 500  # completions that are written at once
ENOUGH = 100  # effective samples that an estimate by reweighting needs


@dataclass(frozen=True)
class Mean:
    """A mean over independent samples with its standard error."""

    mean: float
    error: float
    count: int

    @classmethod
    def of(cls, samples: Sequence[float] | np.ndarray | Tensor) -> "Mean":
        values = np.asarray(samples, dtype=np.float64)
        if len(values) < 2:
            return cls(float(values.mean()) if len(values) else math.nan, math.nan, len(values))
        return cls(float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))), len(values))

    @property
    def interval(self) -> tuple[float, float]:
        return self.mean - Z * self.error, self.mean + Z * self.error

    def __str__(self) -> str:
        if self.count < 2:
            return "too few samples"
        return f"{self.mean:.2f} ({self.interval[0]:.2f} to {self.interval[1]:.2f})"


@dataclass(frozen=True)
class Difference:
    """The difference of two means of independent samples, with B.L. Welch's standard error.

    Its interval is of the normal distribution, since there are many samples.
    """

    before: Mean
    after: Mean

    @property
    def mean(self) -> float:
        return self.after.mean - self.before.mean

    @property
    def error(self) -> float:
        return math.hypot(self.before.error, self.after.error)

    @property
    def interval(self) -> tuple[float, float]:
        return self.mean - Z * self.error, self.mean + Z * self.error

    @property
    def p(self) -> float:
        """How often chance alone gives a difference this large, in either direction."""
        return math.erfc(abs(self.mean) / self.error / math.sqrt(2)) if self.error > 0 else math.nan

    def to_json(self) -> dict | None:
        if min(self.before.count, self.after.count) < 2:
            return None
        return {"mean": self.mean, "interval": self.interval, "p": self.p if self.error > 0 else None}

    @property
    def is_gain(self) -> bool:
        return self.interval[0] > 0

    def __str__(self) -> str:
        if min(self.before.count, self.after.count) < 2:
            return "too few samples"
        p = "p < 0.0001" if self.p < 1e-4 else f"p = {self.p:.4f}"
        return f"{self.mean:+.2f} ({self.interval[0]:+.2f} to {self.interval[1]:+.2f}, {p})"


@dataclass(frozen=True)
class Samples:
    """Completions that a policy wrote; each field has one entry per completion."""

    prompts: list[str]
    texts: list[str]
    ended: np.ndarray  # (N,) bool: with the end token, not by running out of room
    kl: np.ndarray  # (N,): log pi / pi_ref of the whole completion, in nats; its mean is an estimate of the KL
    rewards: np.ndarray  # (N,)

    def __len__(self) -> int:
        return len(self.texts)


@torch.no_grad()
def write(
    policy: Transformer, reference: Transformer, reward: RewardModel, material: Material, *,
    count: int, temperature: float, seed: int,
) -> Samples:  # fmt: skip
    """``count`` completions of prompts that were held out, scored; the same noise for the same seed."""
    draw = generator(seed, 5)
    device = next(policy.parameters()).device
    room = material.context - material.longest_prompt
    columns: dict[str, list] = {name: [] for name in ("prompts", "texts", "ended", "kl", "rewards")}
    for begin in range(0, count, BATCH):
        size = min(BATCH, count - begin)
        chosen = torch.randint(0, len(material.test_prompts), (size,), generator=draw).tolist()
        written = generate(
            policy, [material.test_prompts[i].to(device) for i in chosen], max_new_tokens=room, temperature=temperature,
            stop_tokens=[material.end], seed=int(torch.randint(0, 2**62, (), generator=draw)),
        )  # fmt: skip
        batch = Completions(written.tokens.clone(), written.prompt_lengths.clone(), written.lengths.clone())
        log_probs = [token_log_probs(model, batch, temperature=temperature).sum(dim=1) for model in (policy, reference)]
        rows = list(zip(batch.tokens.tolist(), batch.prompt_lengths.tolist(), batch.lengths.tolist(), strict=True))
        columns["prompts"] += [material.decode(row[:start]) for row, start, _ in rows]
        columns["texts"] += [material.decode(row[start:stop]) for row, start, stop in rows]
        columns["ended"] += [row[stop - 1] == material.end for row, _, stop in rows]
        columns["kl"] += (log_probs[0] - log_probs[1]).double().tolist()
        columns["rewards"] += score(reward, batch).double().tolist()
    arrays = {name: np.array(columns[name]) for name in ("ended", "kl", "rewards")}
    return Samples(columns["prompts"], columns["texts"], **arrays)


@dataclass(frozen=True)
class Measured:
    """What the samples of a policy say of it, in figures."""

    name: str
    samples: Samples
    kl: Mean
    reward: Mean
    known: Mean | None  # human rating of the samples that are known words; None where completions have no ratings
    known_held_out: Mean | None  # of those of them that no preference was learned from
    words: int  # different words among the known ones
    words_held_out: int
    plausible: float | None  # share of samples that look like words
    ended: float  # share of samples that end by themselves
    distinct: float  # share of samples that are the first of their kind

    @classmethod
    def of(cls, name: str, samples: Samples, material: Material) -> "Measured":
        ratings = material.ratings
        known = [t for t in samples.texts if t in ratings]
        held_out = [t for t in known if t in material.held_out]
        rated, rated_held_out = (
            Mean.of([ratings[t] for t in texts]) if ratings else None for texts in (known, held_out)
        )
        return cls(
            name, samples, Mean.of(samples.kl), Mean.of(samples.rewards), rated, rated_held_out,
            len(set(known)), len(set(held_out)),
            float(np.mean([material.is_plausible(t) for t in samples.texts])) if ratings else None,
            float(samples.ended.mean()), len(set(zip(samples.prompts, samples.texts, strict=True))) / len(samples),
        )  # fmt: skip

    def to_json(self) -> dict:
        def figures(mean: Mean | None):
            if mean is None:
                return None
            if mean.count < 2:  # no interval, and NaN is no JSON
                return {"count": mean.count}
            return {"mean": mean.mean, "standard_error": mean.error, "interval": mean.interval, "count": mean.count}

        values = {key: figures(getattr(self, key)) for key in ("kl", "reward", "known", "known_held_out")}
        shares = {key: getattr(self, key) for key in ("words", "words_held_out", "plausible", "ended", "distinct")}
        return {"name": self.name, "samples": len(self.samples), **values, **shares}


def plausible_by_chance(material: Material, count: int = 5000, seed: int = 0) -> float:
    """The share of strings that look like words if their letters are those of the words, shuffled among all of them."""
    rng, words = np.random.default_rng(seed), sorted(material.ratings)
    letters = np.array(list("".join(words)))
    lengths = rng.choice([len(word) for word in words], count)
    return float(np.mean([material.is_plausible("".join(rng.choice(letters, n))) for n in lengths]))


@dataclass(frozen=True)
class PathPoint:
    """A policy as it was measured during its training."""

    step: int
    kl: Mean
    reward: Mean

    @classmethod
    def from_json(cls, values: dict) -> "PathPoint":
        """Inverse of ``dataclasses.asdict``."""
        return cls(values["step"], Mean(**values["kl"]), Mean(**values["reward"]))


def best_possible(samples: Samples) -> list[tuple[float, float]]:
    """The most reward that a policy can have at a KL, as points (KL, reward): pi*(y) = pi_ref(y) exp(r(y) / beta) / Z.

    Estimated by giving the reference's own samples the weights exp(r / beta), as far as enough of them still count.
    """
    curve = []
    for beta in np.geomspace(20, 0.02, 200):
        z = samples.rewards / beta
        weights = np.exp(z - z.max())
        weights /= weights.sum()
        if 1 / (weights**2).sum() < ENOUGH:
            break
        kl = float((weights * np.log(np.maximum(weights * len(samples), 1e-300))).sum())
        curve.append((kl, float((weights * samples.rewards).sum())))
    return curve
