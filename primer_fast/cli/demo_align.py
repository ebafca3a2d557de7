"""The demo's chapter on preferences."""

from pathlib import Path

from primer_fast.cli import page
from primer_fast.cli.align_stages import Result


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
