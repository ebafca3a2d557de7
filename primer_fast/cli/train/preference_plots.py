"""The curves of a procedure on completions."""

from pathlib import Path

from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from primer_fast.cli.plots import MUTED, TEST, TRAIN, curve, picture

NAMES = {  # of metrics, where the last part of the key does not say it
    "objective/scores": "score", "objective/rlhf_reward": "score less KL penalty",
    "policy/clipfrac_avg": "clipped (share)", "policy/approxkl_avg": "0.5 mean (log ratio)²",
    "rewards/margins": "their difference", "min_reward": "lowest", "mean_reward": "mean", "max_reward": "highest",
}  # fmt: skip


def curves(path: Path, rows: list[dict], title: str, panels: list[tuple[str, tuple[str, ...]]], step: str) -> None:
    """A panel for each (label of its axis, metrics in it) against ``step``."""
    with picture(path, 3.6 * len(panels) + 0.4, 3.6, title) as figure:
        for axes, (label, keys) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for key, colour in zip(keys, (TRAIN, TEST, MUTED), strict=False):
                curve(axes, rows, key, colour, NAMES.get(key, key.split("/")[-1]))
            axes.set(xlabel=step, ylabel=label)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.margins(x=0.03)
            if len(keys) > 1:
                axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(keys), fontsize=8, columnspacing=1)
