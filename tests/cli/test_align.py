"""primer-fast align in a tiny setting, end to end, and that what it reports is what it says."""

import json
import math

import matplotlib.image
import numpy as np
import pytest
import torch
from cli.commands import ALIGN, LEXICON, metrics

from primer_fast.cli import align, main, sample
from primer_fast.cli.align import data as align_data
from primer_fast.cli.align import measure as align_measure
from primer_fast.cli.align.measure import Difference, Mean, Measured, Samples
from primer_fast.cli.console import Display
from primer_fast.cli.demo import chapters as demo_chapters
from primer_fast.cli.train import pair_accuracy
from primer_fast.data.completions import encode_pairs
from primer_fast.data.preferences import Preference, RatedText
from primer_fast.models.reward import RewardModel
from primer_fast.models.transformer import Transformer, TransformerConfig
from primer_fast.train.reward import wilson_interval

pytestmark = pytest.mark.usefixtures("plain_path")
TINY = [*ALIGN.split(), "--sft.steps", "60"]


@pytest.fixture
def lexicon(monkeypatch):
    monkeypatch.setattr(align, "load_lexicon", lambda: LEXICON)


def test_words(lexicon, tmp_path, capsys):
    out = tmp_path / "run"
    assert main([*TINY, "--out", str(out)]) == 0
    for name in ("frontier.png", "samples.png", "curves.png"):
        assert matplotlib.image.imread(out / name).shape[1] > 500
    page, printed = (out / "index.html").read_text(), capsys.readouterr().out
    for words in ("Pretraining sees how all of them are spelled", "look like words", "DPO, beta 2", "Welch", "Samples"):
        assert words in page
    assert "reward model: right on" in printed and "human rating of known words" in printed
    results = json.loads((out / "results.json").read_text())
    assert set(results["after"]) == {"ppo", "dpo beta 0.5", "dpo beta 2"} and results["before"]["samples"] == 40
    assert abs(results["before"]["kl"]["mean"]) < 1e-9 and results["before"]["kl"]["count"] == 40
    assert [row["step"] for row in metrics(out / "ppo")] == [1, 2, 3, 4]
    options = sample.Options(run=out / "dpo-2", tokens=10, line=True, temperature=1.0, count=3)
    assert all(text.isalpha() or not text for text in sample.run(options))


def test_what_is_not_its_own_is_kept(lexicon, tmp_path, refused):
    (tmp_path / "letter.txt").write_text("dear")
    assert "not the folder of a run" in refused([*TINY, "--out", str(tmp_path)])
    assert (tmp_path / "letter.txt").exists()


def test_sentences(tmp_path, capsys):
    rows = [
        f"{i}\t{r}\tthe film is {w} and long no {i} of all"
        for i in range(12)
        for w, r in (("good", 2.5), ("bad", -2.0))
    ]
    (tmp_path / "rated.tsv").write_text("id\tmean_rating\ttext\n" + "\n".join(rows) + "\n")
    (tmp_path / "text.txt").write_text("the film is one of them. " * 40)
    argv = [*TINY, "--ratings", str(tmp_path / "rated.tsv"), "--text", str(tmp_path / "text.txt"), "--context", "32"]
    assert main([*argv, "--language.steps", "4", "--out", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "index.html").read_text()
    assert "No one has rated these sentences" in page and "mean human rating of" not in page
    assert "the film is" in page


def test_preferences_of_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(align.align_plots, "draw", lambda folder, result: None)
    monkeypatch.setattr(align.align_report.page, "picture", lambda path, caption: "")
    rows = [{"prompt": f"say {i} ", "chosen": "good", "rejected": "bad"} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [*TINY, "--preferences", str(tmp_path / "pairs.jsonl"), "--context", "16", "--out", str(tmp_path / "run")]
    assert main(argv) == 0
    assert "No one has rated these completions" in (tmp_path / "run" / "index.html").read_text()


def test_the_budget_ends_a_policy_within_it(lexicon, tmp_path):
    argv = [*TINY[1:], "--out", str(tmp_path), "--kl-budget", "0.3", "--ppo.lr", "0.01", "--ppo.steps", "12"]
    options = align.parse(argv)
    with Display() as display:
        result = align.run(options, display)
    assert not result.ppo.in_budget
    assert result.ppo.path[-1].step < 12 and all(p.kl.interval[1] <= 0.3 for p in result.ppo.path)
    assert result.ppo.measured.kl.interval[0] <= 0.3 < result.ppo.rows[-1]["objective/kl"]
    rlhf, dpo = demo_chapters.rlhf(tmp_path, result), demo_chapters.dpo(tmp_path, result)
    assert "RLHF: a reward model and PPO" in rlhf.html and "look like words" in dpo.html


def test_words_held_out_are_in_no_pair_learned_from():
    material = align_data.words(LEXICON, pairs=200, minimum_gap=1.0, held_out=0.3, seed=0)

    def texts(side):
        return {material.decode(row[1:n]) for row, n in zip(side.tokens.tolist(), side.lengths.tolist(), strict=True)}

    train = texts(material.train_pairs.chosen) | texts(material.train_pairs.rejected)
    test = texts(material.test_pairs.chosen) | texts(material.test_pairs.rejected)
    assert train and test and test <= material.held_out and not train & material.held_out
    assert texts(material.corpus) == {t.text for t in LEXICON}
    assert material.is_plausible("unjoyless") and not material.is_plausible("xqz") and not material.is_plausible("")


def test_sentences_are_cut_at_the_context():
    rated = [RatedText(f"one two three {'word ' * n}".strip(), n) for n in range(1, 9)]
    material = align_data.sentences(
        rated, None, tokenizer="characters", context=28, pairs=20, minimum_gap=1.0, held_out=0.3, seed=0
    )
    corpus = material.corpus
    whole = corpus.tokens.gather(1, corpus.lengths[:, None] - 1)[:, 0] == material.end
    assert corpus.lengths.max() == 28 and whole.any() and not whole.all()
    assert [material.decode(p.tolist()) for p in material.prompts] == ["one two three"]


def test_bytes_are_cut_inside_a_character():
    rated = [RatedText(f"one two three {'é' * n}", n) for n in range(1, 30)]
    material = align_data.sentences(
        rated, None, tokenizer="bytes", context=20, pairs=20, minimum_gap=1.0, held_out=0.3, seed=0
    )
    assert material.corpus.lengths.max() == 20 and 10 in material.corpus.tokens


def test_preferences_without_prompts():
    given = [Preference("", f"good {i}", f"bad {i}") for i in range(10)]
    material = align_data.pairs(given, None, tokenizer="bytes", context=20, held_out=0.2, seed=0)
    assert [p.tolist() for p in material.prompts] == [[10]] and len(material.test_pairs) == 2
    assert (material.corpus.prompt_lengths == 1).all() and (material.corpus.tokens[:, 0] == 10).all()


def tiny_models(material):
    torch.manual_seed(0)
    config = TransformerConfig(
        vocab=material.tokenizer.vocab_size, context=material.context, width=16, layers=1, heads=2
    )
    return Transformer(config), Transformer(config), RewardModel(config)


def test_the_kl_of_samples_is_the_exact_one():
    """Words of one letter: the KL of one token and of the end after it can be summed over all of them."""
    material = align_data.words(
        [RatedText(c, r) for c, r in zip("abcd", (-2, -1, 1, 2), strict=True)], pairs=4, minimum_gap=0.5, held_out=0.5,
        seed=1,
    )  # fmt: skip
    policy, reference, reward = tiny_models(material)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.1 * torch.randn_like(p))

    def write(seed, temperature=1.0):
        return align_measure.write(policy, reference, reward, material, count=3000, temperature=temperature, seed=seed)

    vocab = material.tokenizer.vocab_size
    start = torch.tensor([[material.end]])
    with torch.no_grad():
        first = [m.logits(m.hidden(start))[0, -1].double().log_softmax(-1) for m in (policy, reference)]
        rows = torch.cat((start.expand(vocab, 1), torch.arange(vocab)[:, None]), dim=1)
        second = [m.logits(m.hidden(rows))[:, -1].double().log_softmax(-1) for m in (policy, reference)]
    p = first[0].exp()
    later = (second[0].exp() * (second[0] - second[1])).sum(-1)
    later[material.end] = 0
    exact = (p * (first[0] - first[1] + later)).sum().item()
    found = Mean.of(write(0).kl)
    assert exact > 10 * found.error and abs(found.mean - exact) < 4 * found.error
    assert write(5).texts == write(5).texts != write(6).texts


def test_the_best_possible_is_the_tilted_distribution():
    """Rewards that are normal: a tilt by 1 / beta moves the mean by 1 / beta and costs 1 / (2 beta^2)."""
    rewards = np.random.default_rng(0).standard_normal(20000)
    samples = Samples([""] * 20000, [""] * 20000, np.ones(20000), np.zeros(20000), rewards)
    curve = align_measure.best_possible(samples)
    assert len(curve) > 20 and curve[-1][0] > 0.5
    for kl, reward in curve:
        assert reward == pytest.approx(math.sqrt(2 * max(kl, 0)), abs=0.12)


def test_means_and_their_difference():
    a, b = Mean.of([1.0, 2.0, 3.0]), Mean.of([3.0, 5.0])
    assert a.mean == 2 and a.error == pytest.approx(1 / math.sqrt(3)) and a.count == 3
    gain = Difference(a, b)
    assert gain.mean == 2 and gain.error == pytest.approx(math.hypot(1 / math.sqrt(3), 1.0))
    assert gain.p == pytest.approx(math.erfc(2 / gain.error / math.sqrt(2))) and not gain.is_gain
    assert Difference(b, a).mean == -2 and Difference(Mean(0, 0.1, 9), Mean(1, 0.1, 9)).is_gain
    assert str(Mean.of([])) == "too few samples" == str(Difference(Mean.of([]), a))


def test_known_words_are_counted_apart_where_they_were_held_out():
    material = align_data.words(LEXICON, pairs=50, minimum_gap=1.0, held_out=0.3, seed=0)
    held, learned = sorted(material.held_out)[0], sorted(set(material.ratings) - material.held_out)[0]
    texts = [held, learned, learned, "qqq"]
    samples = Samples([""] * 4, texts, np.ones(4), np.arange(4.0), np.zeros(4))
    found = Measured.of("x", samples, material)
    assert found.known.count == 3 and found.known_held_out.count == 1
    assert found.known_held_out.mean == material.ratings[held]
    assert (found.words, found.words_held_out) == (2, 1)
    assert found.plausible == 0.75 and found.distinct == 0.75 and found.kl.mean == 1.5


def test_the_interval_of_the_accuracy_knows_that_pairs_share_texts():
    """One text in every pair: the pairs are worth no more than a draw of few texts."""
    material = align_data.words(LEXICON, pairs=200, minimum_gap=1.0, held_out=0.3, seed=0)
    reward = tiny_models(material)[2]
    found = pair_accuracy.reward_accuracy(reward, material.test_pairs)
    low, high = found.interval
    assert low < found.share < high and found.total == len(material.test_pairs)
    naive = 1.96 * math.sqrt(found.share * (1 - found.share) / found.total)
    assert high - low > 2 * naive


def test_all_right_leaves_doubt():
    """Though pairs share a text and are drawn anew, as many as ever are right."""
    given = [Preference("", "good", f"bad {i}") for i in range(11)]
    pairs = encode_pairs(given, lambda text: list(text.encode()), end=0, context=20)
    found = pair_accuracy.accuracy_of(torch.ones(11, dtype=torch.bool), pairs)
    assert found.share == 1 and found.interval == wilson_interval(11, 11) and found.interval[0] < 0.8


def test_where_no_pairs_share_a_text_the_interval_is_wilsons():
    given = [Preference("", f"good {i}", f"bad {i}") for i in range(20)]
    pairs = align_data.pairs(given, None, tokenizer="bytes", context=20, held_out=0.5, seed=0).test_pairs
    found = pair_accuracy.accuracy_of(torch.tensor([True] * 7 + [False] * 3), pairs)
    assert (found.right, found.total) == (7, 10) and found.interval == wilson_interval(7, 10)


def test_random_letters_rarely_look_like_words():
    material = align_data.words(LEXICON, pairs=20, minimum_gap=1.0, held_out=0.3, seed=0)
    assert all(map(material.is_plausible, material.ratings))
    assert align_measure.plausible_by_chance(material) < 0.1
