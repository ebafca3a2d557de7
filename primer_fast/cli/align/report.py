"""The page of `primer-fast align`: definitions, results with their intervals, samples side by side, pictures."""

import shlex
from pathlib import Path

from primer_fast import __version__
from primer_fast.cli import page
from primer_fast.cli.align.measure import Measured, plausible_by_chance
from primer_fast.cli.align.stages import Alignment

SHOWN = 24  # samples of each policy
RATING = "mean human rating of sampled known words"
DEFINITIONS = {  # HTML
    "policy &pi;": "the language model; &pi;<sub>ref</sub> is the pretrained one, from which all start",
    "reward model": "loss = &minus;log &sigma;(r(x, y<sub>w</sub>) &minus; r(x, y<sub>l</sub>)), y<sub>w</sub> "
    "preferred; r is read at the last token; scaled to variance 1 over the texts trained on",
    "pair accuracy": "share of pairs of held-out texts with r(y<sub>w</sub>) &gt; r(y<sub>l</sub>); "
    "95 % interval by the bootstrap over texts, since pairs share texts",
    "KL": "E<sub>y ~ &pi;</sub>[log &pi;(y | x) &minus; log &pi;<sub>ref</sub>(y | x)], summed over the tokens of a "
    "completion, in nats; the mean over samples of &pi; estimates it without bias, with the standard error of that "
    "mean",
    "what both maximise": "E[r] &minus; &beta; KL(&pi; || &pi;<sub>ref</sub>); the optimum is &pi;*(y | x) = "
    "&pi;<sub>ref</sub>(y | x) exp(r / &beta;) / Z(x)",
    "PPO": "r<sub>t</sub> = &minus;&beta; kl<sub>t</sub>, the reward added at the last token; advantages by GAE, "
    "whitened; loss = mean max(&minus;A &rho;, &minus;A clip(&rho;, 1 &minus; &epsilon;, 1 + &epsilon;))",
    "DPO": "loss = &minus;log &sigma;(&beta; h), h = (log &pi;(y<sub>w</sub>) &minus; log &pi;(y<sub>l</sub>)) "
    "&minus; (log &pi;<sub>ref</sub>(y<sub>w</sub>) &minus; log &pi;<sub>ref</sub>(y<sub>l</sub>))",
    "95 % interval of a mean": "mean &plusmn; 1.96 standard errors; samples are independent. Of a difference: Welch's "
    "standard error, two-sided p from the normal distribution",
}


def summary(result: Alignment) -> str:
    """The results in a few lines."""
    lines = [f"reward model: {result.accuracy} of held-out texts in the right order"]
    for policy in result.policies[1:]:
        line = f"after {policy.name}: reward {result.gain(policy, 'reward')}, KL {policy.kl} nats"
        if policy.known is not None:
            line += f"; human rating of known words {result.gain(policy, 'known')}"
        lines.append(line)
    return "\n".join(lines)


def page_of(folder: Path, result: Alignment, seconds: float) -> str:
    material = result.material
    subtitle = f"primer_fast {__version__}; made in {seconds:.0f} s by `primer-fast align`"
    sections = [_results(result), _definitions(), _data(result), _reward_model(result), _frontier(folder, result)]
    sections += [_human(folder, result) if material.ratings else _unrated(folder, result)]
    sections += [_samples(result), _curves(folder, result, seconds), _limits(result), _on(result)]
    return page.page("Learning what people prefer: PPO and DPO", subtitle, *sections)


def _results(result: Alignment) -> str:
    parts = [
        page.text(
            f"A transformer learns {result.material.name}, then what people think of them, once through a reward model "
            "and PPO, once through DPO, from the same start and the same preferences."
        ),
        page.number(f"Reward model, held-out pairs: {result.accuracy}", result.accuracy.interval[0] > 0.5),
    ]
    for policy in result.policies[1:]:
        kind, words = ("reward", "reward") if policy.known is None else ("known", RATING)
        gain = result.gain(policy, kind)
        parts.append(page.number(f"{policy.name}: {words} {gain}", gain.is_gain))
        within = policy.kl.interval[1] <= result.options.kl_budget
        verdict = "within" if within else "NOT within"
        parts.append(page.text(f"KL {policy.kl} nats, {verdict} the budget of {result.options.kl_budget:g} nats."))
    return page.section("What came out", *parts)


def _definitions() -> str:
    rows = "".join(f"<tr><td>{name}</td><td>{what}</td></tr>" for name, what in DEFINITIONS.items())
    return page.section("Definitions", f"<table>{rows}</table>")


def _data(result: Alignment) -> str:
    material, options = result.material, result.options
    if material.ratings:
        words = (
            f"{len(material.ratings):,} English words, each rated from -4 to 4 by ten people (the lexicon of "
            "vaderSentiment, C.J. Hutto and E. Gilbert, ICWSM 2014). Pretraining sees how all of them are spelled and "
            f"no rating. Preferences are pairs of words whose mean ratings differ by {options.minimum_gap:g} or more: "
            f"{len(material.train_pairs):,} to learn from, and {len(material.test_pairs):,} of "
            f"{len(material.held_out):,} other words that are in no pair learned from."
        )
    else:
        words = (
            f"{len(material.corpus):,} {material.unit}s as prompt and completion, cut where the context of "
            f"{material.context} {material.tokenizer.unit}s ends. {len(material.train_pairs):,} preference pairs to "
            f"learn from, {len(material.test_pairs):,} held out. PPO draws its prompts from the "
            f"{len(material.prompts):,} of training; what is measured below was written on "
            f"{len(material.test_prompts):,} held-out prompts."
        )
    return page.section("The data", page.text(words))


def _reward_model(result: Alignment) -> str:
    parts = [page.number(str(result.accuracy), result.accuracy.interval[0] > 0.5)]
    if result.material.ratings:
        parts.append(
            page.text(
                "What carries over to words that it never saw rated is their form: prefixes and suffixes (un-, -less, "
                "-ful), and stems that held-out words share with others (happy, happier, unhappy). A model of letters "
                "can know no more of a new word."
            )
        )
    return page.section("Reward model", *parts)


def _frontier(folder: Path, result: Alignment) -> str:
    rows = [
        (p.name, str(p.reward), str(p.kl), f"{p.ended:.1%}", f"{p.distinct:.0%}", f"{len(p.samples):,}")
        for p in _every(result)
    ]
    ended = [p.measured.name for p in (result.ppo, *result.dpo.values()) if not p.in_budget]
    note = f" The budget ended {', '.join(ended)} early." if ended else ""
    return page.section(
        "Reward against KL",
        page.picture(
            folder / "frontier.png",
            "Each policy from the start (KL 0) to its end. Dashed: the best trade there is for this reward, estimated "
            "by reweighting the samples of the pretrained policy with exp(r / beta).",
        ),
        page.table(("policy", "reward", "KL (nats)", "ends by itself", "distinct", "samples"), rows),
        page.text(
            f"In brackets 95 % intervals. Every policy is sampled in the same way, at temperature "
            f"{result.options.temperature:g}. A policy whose KL would exceed the budget of "
            f"{result.options.kl_budget:g} nats goes back to where it was measured last within it, and ends.{note} Of "
            "the DPO policies the one of most reward is shown below; the reward model chose it, not the human ratings."
        ),
    )  # fmt: skip


def _every(result: Alignment) -> list[Measured]:
    return [result.before, result.ppo.measured, *(policy.measured for policy in result.dpo.values())]


def _human(folder: Path, result: Alignment) -> str:
    rated = [(p, p.known, p.known_held_out) for p in _every(result) if p.known and p.known_held_out]

    def gain(policy: Measured, what: str) -> str:
        return "" if policy is result.before else str(result.gain(policy, what))

    rows = [
        (p.name, f"{known.count:,} of {p.words:,}", str(known), gain(p, "known"),
         f"{held_out.count:,} of {p.words_held_out:,}", str(held_out), gain(p, "known_held_out"))
        for p, known, held_out in rated
    ]  # fmt: skip
    shares = [
        (p.name, f"{known.count / len(p.samples):.1%}", f"{p.plausible:.1%}", f"{p.distinct:.0%}")
        for p, known, _ in rated
    ]
    return page.section(
        "What people think of what it writes",
        page.text(
            "Of the samples those that are words of the lexicon have a human rating that no model computed. The second "
            "half of the table counts those alone that no preference was learned from. '1,000 of 300' are 1,000 "
            "samples of 300 different words."
        ),
        page.picture(folder / "samples.png", "Human ratings of the sampled words; the line is their mean."),
        page.table(
            ("policy", "known", "mean rating", "against before", "held out", "mean rating", "against before"), rows
        ),
        page.table(("policy", "known words", "look like words", "distinct"), shares),
        page.text(
            "A sample looks like a word where every three letters in a row, its borders included, occur in some word "
            "of the lexicon; of random letters, as frequent as in its words, "
            f"{plausible_by_chance(result.material):.1%} do. Brackets: 95 % intervals."
        ),
    )


def _unrated(folder: Path, result: Alignment) -> str:
    rows = [(p.name, str(p.reward), str(result.gain(p, "reward"))) for p in result.policies[1:]]
    return page.section(
        "What the reward model thinks of what it writes",
        page.text(
            f"No one has rated these {result.material.unit}s: they are new. So the reward model's score is all that is "
            f"shown, and it is as good as its held-out accuracy, {result.accuracy.share:.1%}. A policy can also learn "
            "to please the reward model alone; reading the samples below is the test of that."
        ),
        page.picture(folder / "samples.png", "Rewards of the samples; the line is their mean."),
        page.table(("policy", "reward", "against before"), rows),
    )


def _samples(result: Alignment) -> str:
    ratings = result.material.ratings

    def cell(policy: Measured, i: int) -> str:
        text = policy.samples.texts[i]
        if not ratings:
            return f"{text.strip()} [{policy.samples.rewards[i]:+.1f}]"
        return f"{text} ({ratings[text]:+.1f})" if text in ratings else text

    count = min(SHOWN if ratings else SHOWN // 2, len(result.before.samples))
    head = ["before", *(f"after {p.name}" for p in result.policies[1:])]
    rows = [[cell(p, i) for p in result.policies] for i in range(count)]
    if not ratings:
        head = ["prompt", *head]
        rows = [[result.before.samples.prompts[i], *row] for i, row in enumerate(rows)]
    note = "in brackets the human rating, where it is known" if ratings else "in brackets the reward"
    return page.section(
        "Samples", page.text(f"The first {count} of each, with the same prompts and noise, none left out; {note}."),
        page.table(head, rows),
    )  # fmt: skip


def _curves(folder: Path, result: Alignment, seconds: float) -> str:
    rows = [(name, f"{value:.0f} s") for name, value in result.seconds.items()]
    return page.section(
        "How it learned",
        page.picture(folder / "curves.png", "Every stage against its steps."),
        page.table(("stage", "time"), [*rows, ("in total", f"{seconds:.0f} s")]),
    )


def _limits(result: Alignment) -> str:
    words = [
        "The model knows letters, not meanings: what it prefers beyond the texts trained on comes from shared forms.",
        "The reward is the reward model's; the further a policy goes, the less it says about people.",
    ]
    if result.material.ratings:
        words.append(
            "Ratings exist for words of the lexicon alone, so the mean over known words says nothing of the samples "
            "that are none; their share is given."
        )
    return page.section("What this does not show", *map(page.text, words))


def _on(result: Alignment) -> str:
    out = result.options.out
    prompt = "" if result.material.ratings else f" --prompt {shlex.quote(result.before.samples.prompts[0])}"
    more = f"{prompt} --line --temperature 1 --count 10"
    return page.section(
        "Go on from here",
        page.code(
            f"primer-fast sample {out}/ppo{more}\n"
            f"primer-fast sample {out}/dpo-{result.best_beta:g}{more}\n"
            f"primer-fast train ppo --model {out}/language --reward {out}/reward --prompts FILE\n"
            f"# every figure: {out}/results.json, {out}/*/metrics.jsonl"
        ),
    )
