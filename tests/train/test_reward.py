"""Reward modelling and supervised fine-tuning of a small transformer."""

import math

import pytest
import torch
from procedures import encode

from primer_fast.cli.train.pair_accuracy import reward_accuracy
from primer_fast.data.completions import Completions, encode_completions, encode_pairs
from primer_fast.data.preferences import Preference
from primer_fast.models.reward import RewardModel
from primer_fast.models.transformer import Transformer, TransformerConfig
from primer_fast.train import reward, sft

pytestmark = pytest.mark.usefixtures("plain_path")

CONFIG = TransformerConfig(vocab=12, context=16, width=16, layers=2, heads=2)


def make_pairs(count=40):
    """The text with more of the letter a is preferred."""
    g = torch.Generator().manual_seed(0)
    draw = lambda: "".join("abcd"[i] for i in torch.randint(0, 4, (6,), generator=g))  # noqa: E731
    pairs = []
    while len(pairs) < count:
        one, other = draw(), draw()
        gap = one.count("a") - other.count("a")
        if gap > 0:
            pairs.append(Preference("", one, other, float(gap)))
    return encode_pairs(pairs, encode, end=0, context=16)


def make_model(config=CONFIG):
    torch.manual_seed(0)
    return RewardModel(config)


def settings(**changes):
    defaults = {"lr": 3e-3, "batch_size": 10, "epochs": 15, "log_every": 1, "warmup_steps": 5}
    return reward.RewardConfig(**{**defaults, **changes})


def test_the_reward_is_read_at_the_last_real_token():
    model, batch = make_model(), make_pairs().stacked()
    got = reward.score(model, batch)
    for row in range(0, len(batch), 7):
        tokens = batch.tokens[row : row + 1, : batch.lengths[row]]
        torch.testing.assert_close(got[row], model.values(tokens)[0, -1])
    padded = Completions(torch.nn.functional.pad(batch.tokens, (0, 3), value=5), batch.prompt_lengths, batch.lengths)
    torch.testing.assert_close(reward.score(model, padded, batch_size=3), got)


def test_the_head_starts_small():
    torch.manual_seed(1)
    weights = torch.cat([RewardModel(CONFIG).head.weight.flatten() for _ in range(60)])
    assert weights.std().item() == pytest.approx(17**-0.5, rel=0.1) and RewardModel(CONFIG).head.bias == 0


def test_it_learns_what_is_preferred_and_it_holds_on_others():
    model, pairs = make_model(), make_pairs(140)
    rows = list(reward.train(reward.start(model, settings()), pairs[:100], settings()))
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=0.35) and rows[-1]["loss"] < 0.3
    chosen, rejected = reward.score(model, pairs[100:].stacked()).chunk(2)
    assert reward.wilson_interval(int((chosen > rejected).sum()), 40)[0] > 0.6
    assert rows[-1]["min_reward"] < rows[-1]["mean_reward"] < rows[-1]["max_reward"]


def test_equal_rewards_are_wrong():
    model, pairs = make_model(), make_pairs()
    torch.nn.init.zeros_(model.head.weight)
    assert reward_accuracy(model, pairs).right == 0


def test_normalised_rewards():
    model, batch = make_model(), make_pairs().stacked()
    for _ in range(2):  # a second time changes nothing
        model.normalise(reward.score(model, batch))
        after = reward.score(model, batch)
        assert after.mean().item() == pytest.approx(0, abs=1e-5)
        assert after.std(correction=0).item() == pytest.approx(1, rel=1e-4)
    assert set(model.state_dict()) >= {"mean", "std"}  # travel with the weights
    with pytest.raises(ValueError, match="must be finite and differ"):
        model.normalise(torch.ones(4))


def test_margins_and_centring_are_in_the_loss():
    pairs = make_pairs(10)
    rewards = reward.score(make_model(), pairs.stacked()).chunk(2)
    for changes, want in (
        ({"margins": True}, reward.pair_loss(*rewards, pairs.margin)),
        ({"centring": 0.5}, reward.pair_loss(*rewards, 0.0, 0.5)),
    ):
        config = settings(steps=1, **changes)
        (row,) = reward.train(reward.start(make_model(), config), pairs, config)
        assert row["loss"] == pytest.approx(want.mean().item(), rel=1e-5)


def test_an_encoder_is_refused():
    with pytest.raises(ValueError, match="must be causal; got causal=False"):
        RewardModel(TransformerConfig(vocab=12, context=16, width=16, layers=1, heads=2, causal=False))


def test_a_language_model_is_copied():
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    made = RewardModel.from_language_model(model)
    assert torch.equal(made.trunk.embedding.weight, model.embedding.weight)
    assert made.trunk.embedding.weight is not model.embedding.weight


# --- supervised fine-tuning


def test_only_completions_are_learned():
    """The loss is the mean over completion tokens of all rows together, whatever the prompts are."""
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    batch = encode_completions([("abc", "d"), ("", "dcba"), ("a", "bb")], encode, end=0, context=16)
    total = count = 0
    for row in range(3):
        tokens = batch.tokens[row : row + 1, : batch.lengths[row]]
        losses = model.loss(tokens[:, :-1], tokens[:, 1:], reduction="none")[0, batch.prompt_lengths[row] - 1 :]
        total, count = total + losses.sum().item(), count + len(losses)
    for accumulate in (1, 2):
        config = sft.SFTConfig(batch_size=3, accumulate=accumulate, steps=1)
        torch.manual_seed(0)
        (row,) = sft.train(sft.start(Transformer(CONFIG), config), batch, config)
        assert row["loss"] == pytest.approx(total / count, rel=1e-5)
    assert sft.evaluate(model, batch, batch_size=2) == pytest.approx(total / count, rel=1e-5)


def test_it_learns_to_end():
    torch.manual_seed(0)
    model, config = Transformer(CONFIG), sft.SFTConfig(batch_size=4, epochs=120, warmup_steps=5, lr=3e-3)
    batch = encode_completions([("a", "bcd"), ("b", "dd"), ("c", "a"), ("d", "cbab")], encode, end=0, context=16)
    list(sft.train(sft.start(model, config), batch, config))
    assert sft.evaluate(model, batch) < 0.1
    for row in range(4):
        tokens = batch.tokens[row : row + 1, : batch.lengths[row]]
        assert model(tokens[:, :-1]).argmax(-1)[0, -1] == 0
