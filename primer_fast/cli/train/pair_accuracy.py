"""How often preferences that were held out are met, with an interval that knows what the pairs have in common."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from primer_fast.data.completions import CompletionPairs
from primer_fast.models.reward import RewardModel
from primer_fast.train.reward import score, wilson_interval

RESAMPLES = 1000


@dataclass(frozen=True)
class Accuracy:
    """Share of pairs in the right order, and a 95 % interval of it.

    Pairs that share a text are not independent. So texts are drawn anew, with replacement, 1,000 times, each pair
    counting as often as both of its texts came; where few pairs share one that errs on the wide side. Where none does
    the interval is Wilson's.
    """

    right: int
    total: int
    interval: tuple[float, float]

    @property
    def share(self) -> float:
        return self.right / self.total

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.share:.1%} of {self.total:,} pairs (95 % interval {low:.1%} to {high:.1%})"


def accuracy_of(right: Tensor, pairs: CompletionPairs, seed: int = 0) -> Accuracy:  # (N,) bool
    """The accuracy on held-out pairs. right: whether each pair was put in the right order."""
    both, met = pairs.stacked(), right.cpu().numpy()
    rows = zip(both.tokens.tolist(), both.lengths.tolist(), strict=True)
    _, ids = np.unique([" ".join(map(str, row[:length])) for row, length in rows], return_inverse=True)
    if ids.max() + 1 == len(ids):
        return Accuracy(int(met.sum()), len(pairs), wilson_interval(int(met.sum()), len(pairs)))
    a, b = np.split(ids, 2)
    rng, shares = np.random.default_rng(seed), []
    for _ in range(RESAMPLES):
        times = rng.multinomial(ids.max() + 1, np.full(ids.max() + 1, 1 / (ids.max() + 1)))
        weights = times[a] * times[b]
        if weights.sum():
            shares.append((weights * met).sum() / weights.sum())
    low, high = np.quantile(shares, (0.025, 0.975)) if shares else (0.0, 1.0)
    least = wilson_interval(int(met.sum()), len(pairs))  # where all are right, drawing them anew shows no doubt
    return Accuracy(int(met.sum()), len(pairs), (min(float(low), least[0]), max(float(high), least[1])))


def reward_accuracy(model: RewardModel, pairs: CompletionPairs, seed: int = 0) -> Accuracy:
    """The accuracy of a reward model on pairs; where both rewards are equal it is wrong."""
    chosen, rejected = score(model, pairs.stacked()).chunk(2)
    return accuracy_of(chosen > rejected, pairs, seed)
