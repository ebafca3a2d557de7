"""The demo's chapter on preferences."""

import dataclasses
from pathlib import Path

from primer_fast.cli import page
from primer_fast.cli.align_stages import Result
from primer_fast.cli.options.align import Options, default_options


def options(folder: Path) -> Options:
    """Of a run that the demo has time for, about a minute of a core."""
    usual = default_options()
    return dataclasses.replace(
        usual, out=folder, width=64, layers=2, samples=2000, points=4, point_samples=250, betas=(0.3,), pairs=10_000,
        sft=dataclasses.replace(usual.sft, epochs=14, lr=4e-3),
        reward=dataclasses.replace(usual.reward, steps=120, lr=2e-3),
        ppo=dataclasses.replace(usual.ppo, steps=30, batch_size=128, lr=6e-4),
        dpo=dataclasses.replace(usual.dpo, steps=78, lr=2e-4),
    )  # fmt: skip


def rlhf(folder: Path, result: Result) -> page.Chapter:
    """Reward model and PPO of `primer-fast align` on words, in short; ``folder`` holds its pictures and own page."""
    title, gain = "RLHF: a reward model and PPO", result.gain(result.ppo.measured, "known")
    found = f"mean human rating of sampled known words {gain} against before"
    html = page.section(
        title,
        page.formula(
            "reward model: L = &minus;log &sigma;(r(x, y<sub>w</sub>) &minus; r(x, y<sub>l</sub>))",
            "max<sub>&pi;</sub> E[r] &minus; &beta; KL(&pi; || &pi;<sub>ref</sub>)",
            "PPO: L = mean max(&minus;A &rho;, &minus;A clip(&rho;, 1 &minus; &epsilon;, 1 + &epsilon;)), &nbsp; "
            "&rho; = &pi; / &pi;<sub>old</sub>",
        ),
        page.text(
            "A transformer learns to write English words letter by letter; a reward model learns from pairs of words "
            "which of two people find more positive; then the transformer learns by PPO to be rewarded, and pays for "
            "moving away from what it was."
        ),
        page.number(f"Reward model, pairs of held-out words: {result.accuracy}", result.accuracy.interval[0] > 0.5),
        page.number(f"PPO: {found}", gain.is_gain),
        page.picture(folder / "frontier.png", "What each policy's reward cost in KL; dashed: no policy has more."),
        page.code(
            "for metrics in reward.train(reward.start(model, config), pairs, config): ...\n"
            "state = ppo.start(ActorCritic(policy, critic), config)\n"
            "for metrics in ppo.train(state, prompts, reference, reward_of, config, end=end): ..."
        ),
    )  # fmt: skip
    return page.Chapter(title, found, html, gain.is_gain and result.accuracy.interval[0] > 0.5)


def dpo(folder: Path, result: Result) -> page.Chapter:
    """DPO of the same run, and what all policies write."""
    title, policy = "DPO: preferences without a reward model", result.dpo[result.best_beta].measured
    gain = result.gain(policy, "known")
    policies = (result.before, result.ppo.measured, policy)
    rows = [
        (policy.name, str(policy.reward), str(policy.kl), str(policy.known), f"{policy.plausible:.0%}")
        for policy in policies
    ]
    count = min(12, len(result.before.samples))
    samples = zip(*(policy.samples.texts[:count] for policy in policies), strict=True)
    found = f"mean human rating of sampled known words {gain} against before"
    html = page.section(
        title,
        page.formula(
            "L = &minus;log &sigma;(&beta; h)",
            "h = log [&pi;(y<sub>w</sub> | x) / &pi;<sub>ref</sub>(y<sub>w</sub> | x)] &minus; "
            "log [&pi;(y<sub>l</sub> | x) / &pi;<sub>ref</sub>(y<sub>l</sub> | x)]",
        ),
        page.text("From the same start and the same pairs, in one step, and nothing is sampled on the way."),
        page.number(f"{policy.name}: {found}", gain.is_gain),
        page.picture(folder / "samples.png", "Human ratings of the sampled words that the lexicon knows."),
        page.table(("policy", "reward", "KL (nats)", "human rating", "look like words"), rows),
        page.table([policies[0].name, *(f"after {policy.name}" for policy in policies[1:])], samples),
        page.code(
            "reference = dpo.reference_log_probs(frozen, pairs, config)\n"
            "for metrics in dpo.train(dpo.start(policy, config), pairs, reference, config): ...\n"
            "\n# both, with a page of their own: primer-fast align"
        ),
    )  # fmt: skip
    return page.Chapter(title, found, html, gain.is_gain)
