"""The demo's chapter on preferences."""

import dataclasses
from pathlib import Path

from primer_fast.cli import align, page
from primer_fast.cli.align_stages import Result


def options(folder: Path) -> align.Options:
    """Of a run that the demo has time for, about a minute of a core."""
    usual = align.default_options()
    return dataclasses.replace(
        usual, out=folder, width=64, layers=2, samples=2000, points=4, point_samples=250, betas=(0.3,), pairs=10_000,
        sft=dataclasses.replace(usual.sft, epochs=14, lr=4e-3),
        reward=dataclasses.replace(usual.reward, steps=120, lr=2e-3),
        ppo=dataclasses.replace(usual.ppo, steps=30, batch_size=128, lr=6e-4),
        dpo=dataclasses.replace(usual.dpo, steps=78, lr=2e-4),
    )  # fmt: skip


def chapter(folder: Path, result: Result) -> str:
    """As HTML: what `primer-fast align` on words found, in short; ``folder`` holds its pictures and its own page."""
    ppo, dpo = result.ppo.measured, result.dpo[result.best_beta].measured
    rows = [
        (policy.name, str(policy.reward), str(policy.kl), str(policy.known), f"{policy.plausible:.0%}")
        for policy in (result.before, ppo, dpo)
    ]
    count = min(12, len(result.before.samples))
    samples = zip(*(policy.samples.texts[:count] for policy in (result.before, ppo, dpo)), strict=True)
    return page.section(
        "Preferences: PPO and DPO",
        page.formula("max<sub>&pi;</sub> E[r] &minus; &beta; KL(&pi; || &pi;<sub>ref</sub>)"),
        page.text(
            "A transformer learns to write English words letter by letter, then which of two words people find more "
            "positive: once through a reward model and PPO, once directly, by DPO. Both start from the same policy and "
            "learn from the same pairs."
        ),
        page.number(f"Reward model, pairs of held-out words: {result.accuracy}", result.accuracy.interval[0] > 0.5),
        *(
            page.number(
                f"{policy.name}: mean human rating of sampled known words {result.gain(policy, 'known')}",
                result.gain(policy, "known").is_gain,
            )
            for policy in (ppo, dpo)
        ),
        page.picture(folder / "frontier.png", "What each policy's reward cost in KL; dashed: no policy has more."),
        page.picture(folder / "samples.png", "Human ratings of the sampled words that the lexicon knows."),
        page.table(("policy", "reward", "KL (nats)", "human rating", "look like words"), rows),
        page.table(("before", f"after {ppo.name}", f"after {dpo.name}"), samples),
        page.code(
            "for metrics in ppo.train(ppo.start(ActorCritic(policy, critic), config), prompts, reference, reward, "
            "config, end=end): ...\n"
            "for metrics in dpo.train(dpo.start(policy, config), pairs, reference_log_probs, config): ...\n"
            "\n# or, with a page of its own: primer-fast align"
        ),
    )  # fmt: skip
