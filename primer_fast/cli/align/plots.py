"""Pictures of `primer-fast align`: reward against KL, what people think of the samples, the curves of every stage."""

from pathlib import Path

import numpy as np
from matplotlib.ticker import MaxNLocator, PercentFormatter

from primer_fast.cli.align.stages import Alignment
from primer_fast.cli.plots import INK, MUTED, TEST, TRAIN, curve, picture

DPO_COLOURS = (TEST, "#6d28d9", "#0f766e", "#a16207", "#be185d")  # of its betas; PPO is TRAIN
DPO_MARKERS = "s^Dvo"


def draw(folder: Path, result: Alignment) -> None:
    """Draw frontier.png, samples.png and curves.png into the folder."""
    frontier(folder / "frontier.png", result)
    histograms(folder / "samples.png", result)
    curves(folder / "curves.png", result)


def frontier(path: Path, result: Alignment) -> None:
    """Reward against KL: each policy during its training and at its end, the most that is possible, the budget."""
    with picture(path, 8.6, 4.6) as figure:
        axes = figure.subplots()
        budget = result.options.kl_budget
        best = [point for point in result.best_possible if point[0] <= 1.05 * budget]
        if best:
            axes.plot(*zip(*best, strict=True), color=MUTED, ls="--", lw=1.4, label="the most that a KL can buy")
        ways = [("PPO", result.ppo, TRAIN, "o")]
        for i, (beta, policy) in enumerate(result.dpo.items()):
            ways.append((f"DPO, beta {beta:g}", policy, DPO_COLOURS[i % 5], DPO_MARKERS[i % 5]))
        for name, policy, colour, marker in ways:
            x, y = [p.kl.mean for p in policy.path], [p.reward.mean for p in policy.path]
            axes.plot(x, y, color=colour, lw=1.2, marker=marker, ms=3.5, alpha=0.65)
            end = policy.measured
            axes.errorbar(
                end.kl.mean, end.reward.mean, xerr=1.96 * end.kl.error, yerr=1.96 * end.reward.error, color=colour,
                marker=marker, ms=8, mec="white", capsize=2, lw=1.2, label=name, zorder=3,
            )  # fmt: skip
        axes.axvline(budget, color=INK, lw=1, ls=":", label=f"budget, {budget:g} nats")
        axes.set(
            xlabel=f"KL to the pretrained policy (nats per {result.material.unit})",
            ylabel="mean reward (standard deviations of the\nreward over the texts trained on)",
            title="Reward against KL: on the way (small), at the end (large, 95 % intervals)",
        )
        axes.set_xlim(-0.03 * budget, 1.05 * budget)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))


def histograms(path: Path, result: Alignment) -> None:
    """How the samples of each policy are rated: by people where ratings are known, else by the reward model."""
    ratings = result.material.ratings
    values = [
        np.array([ratings[t] for t in p.samples.texts if t in ratings]) if ratings else p.samples.rewards
        for p in result.policies
    ]
    low, high = (-4, 4) if ratings else (min(map(np.min, values)), max(map(np.max, values)))
    bins = np.linspace(low, high, 33)
    what = "Human ratings of the sampled words that the lexicon knows" if ratings else "Rewards of the samples"
    with picture(path, 9.6, 3.4, what) as figure:
        cells = figure.subplots(1, 3, sharex=True, sharey=True)
        for axes, policy, found, colour in zip(cells, result.policies, values, (MUTED, TRAIN, TEST), strict=True):
            title = {"before": "before"}.get(policy.name, f"after {policy.name}")
            if len(found):
                axes.hist(found, bins=bins, weights=np.full(len(found), 1 / len(found)), color=colour, alpha=0.85)
                axes.axvline(found.mean(), color=INK, lw=1.2)
                title += f"\nmean {found.mean():+.2f}, {len(found):,} samples"
            axes.set_title(title, fontsize=10, fontweight="normal")
            axes.set_xlabel("mean rating by ten people (-4 to 4)" if ratings else "reward (standard deviations)")
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        cells[0].set_xlim(low, high)
        cells[0].set_ylabel("share of samples")
        cells[0].yaxis.set_major_formatter(PercentFormatter(1))


def curves(path: Path, result: Alignment) -> None:
    """The metrics of every stage against its steps."""
    with picture(path, 9.6, 6.4) as figure:
        ((first, accuracy), (reward, margins)) = figure.subplots(2, 2)
        on_text = [row for row in result.pretraining if "train/loss" in row]
        steps = on_text[-1]["step"] if on_text else 0
        on_completions = [row | {"step": steps + row["step"]} for row in result.pretraining if "loss" in row]
        curve(first, on_text, "train/loss", MUTED, "on running text")
        curve(first, on_completions, "loss", TRAIN, "on completions")
        token = {"characters": "character", "bytes": "byte"}.get(result.material.tokenizer.name, "token")
        first.set(title="Pretraining", xlabel="optimizer step", ylabel=f"loss (nats per {token})")
        if result.material.running_text is not None:
            first.legend(loc="upper right")

        curve(accuracy, result.reward_rows, "accuracy", TRAIN, "pairs trained on")
        low, high = result.accuracy.interval
        share = result.accuracy.share
        accuracy.errorbar(
            result.reward_rows[-1]["step"], share, yerr=[[share - low], [high - share]], color=TEST, marker="o",
            capsize=3, label=f"held-out pairs, {share:.1%}",
        )  # fmt: skip
        accuracy.axhline(0.5, color=MUTED, ls=":", lw=1, label="chance")
        accuracy.set(title="Reward model", xlabel="optimizer step", ylabel="pairs in the right order")
        accuracy.legend(loc="best", fontsize=9)

        curve(reward, result.ppo.rows, "objective/scores", TRAIN, "score")
        curve(reward, result.ppo.rows, "objective/kl", TEST, "KL (nats)")
        reward.set(title="PPO", xlabel="rollout", ylabel=f"mean over the {result.material.unit}s of a rollout")
        reward.legend(loc="best")

        for i, (beta, policy) in enumerate(result.dpo.items()):
            curve(margins, policy.rows, "rewards/accuracies", DPO_COLOURS[i % 5], f"beta {beta:g}")
        margins.set(title="DPO", xlabel="optimizer step", ylabel="pairs moved the right way")
        margins.legend(loc="lower right")
        for axes in (accuracy, margins):
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        for axes in (first, accuracy, reward, margins):
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.margins(x=0.03)
