"""Proximal policy optimisation of a small transformer."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from procedures import END, count_of_3

from primer_fast.data.completions import Completions
from primer_fast.models.actor_critic import ActorCritic
from primer_fast.models.reward import RewardModel
from primer_fast.models.transformer import Transformer, TransformerConfig
from primer_fast.train import ppo
from primer_fast.train.scoring import RewardError, checked_scores, reward_of_lists, reward_of_model

pytestmark = pytest.mark.usefixtures("plain_path")

CONFIG = TransformerConfig(vocab=8, context=16, width=16, layers=1, heads=2, norm="pre", positions="learned")
PROMPTS = [torch.tensor(p) for p in ([0], [0, 3], [0, 4, 5])]
TWELVE = Completions(torch.zeros(12, 3, dtype=torch.int64), torch.ones(12).long(), torch.full((12,), 2))


def make_policy(seed=0):
    torch.manual_seed(seed)
    return Transformer(CONFIG)


def settings(**changes):
    defaults = {
        "steps": 3, "batch_size": 12, "minibatches": 3, "epochs": 2, "max_new_tokens": 6, "temperature": 1.0,
        "lr": 3e-3, "log_every": 1,
    }  # fmt: skip
    return ppo.PPOConfig(**{**defaults, **changes})


def run(config, reward=None, model=None, state=None, stop_after=None, prompts=PROMPTS):
    state = state or ppo.start(model or ActorCritic(make_policy()), config)
    rows = ppo.train(
        state, prompts, make_policy(), reward or reward_of_lists(count_of_3), config, end=END,
        should_stop=lambda: state.step == stop_after,
    )  # fmt: skip
    return state, list(rows)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_nothing_has_moved_in_the_first_pass(dropout):
    """With one optimizer step a rollout, the policy is the one that wrote it, and at first the reference."""
    torch.manual_seed(0)
    policy = Transformer(replace(CONFIG, dropout=dropout))
    _, (row,) = run(settings(steps=1, epochs=1, minibatches=1, temperature=0.7), model=ActorCritic(policy))
    assert row["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert row["objective/rlhf_reward"] == pytest.approx(row["objective/scores"] + row["objective/non_score_reward"])
    assert row["val/ratio"] == pytest.approx(1, abs=1e-6) and row["policy/approxkl_avg"] < 1e-10
    assert row["policy/clipfrac_avg"] == 0 and row["val/clipfrac_avg"] == 0 and row["updates"] == 1


@pytest.mark.parametrize("critic", [None, "shared", "reward model"])
def test_the_reward_rises(critic):
    critic = RewardModel(CONFIG) if critic == "reward model" else critic
    config = settings(steps=25, batch_size=32, minibatches=2, epochs=4, lr=1e-2, kl_coefficient=0.01)
    _, rows = run(config, model=ActorCritic(make_policy(), critic))
    assert rows[-1]["objective/scores"] > 3 * rows[0]["objective/scores"]
    assert rows[-1]["objective/kl"] > 0.5
    assert rows[0]["episode"] == 32 and rows[-1]["episode"] == 25 * 32


def test_a_heavier_penalty_keeps_the_policy_near():
    kl = {}
    for coefficient in (0.01, 3.0):
        _, rows = run(settings(steps=15, batch_size=32, epochs=4, lr=1e-2, kl_coefficient=coefficient))
        kl[coefficient] = sum(row["objective/kl"] for row in rows[-3:]) / 3
    assert kl[3.0] < 0.3 * kl[0.01]


def test_completions_that_do_not_end_are_penalised():
    """The score falls by the penalty for each row without an end token, and by nothing else."""
    plain, penalised = (run(settings(steps=1, missing_end_penalty=penalty))[1][0] for penalty in (0.0, 4.0))
    missing = 12 - plain["val/num_eos_tokens"]
    assert 0 < missing < 12
    assert penalised["objective/scores"] == pytest.approx(plain["objective/scores"] - 4.0 * missing / 12)


def test_the_passes_end_where_the_policy_has_moved_too_far():
    _, far = run(settings(steps=1, lr=0.05, epochs=6))
    _, near = run(settings(steps=1, lr=0.05, epochs=6, stop_kl=1e-4))
    assert far[0]["updates"] == 18 and near[0]["updates"] < 18


def test_the_reward_sees_prompts_and_completions_without_padding():
    seen = []

    def reward(prompts, completions):
        seen.extend(zip(prompts, completions, strict=True))
        return [0.0] * len(prompts)

    run(settings(steps=1), reward_of_lists(reward))
    run(settings(steps=1), reward_of_lists(reward, lambda tokens: "".join(map(str, tokens))))
    tokens, texts = seen[:12], seen[12:]
    assert {tuple(p) for p, _ in tokens} <= {tuple(p.tolist()) for p in PROMPTS}
    assert all(1 <= len(c) <= 6 and END not in c[:-1] for _, c in tokens)
    assert texts == [("".join(map(str, p)), "".join(map(str, c))) for p, c in tokens]


def test_a_reward_model_scores():
    model = RewardModel(CONFIG)
    _, rows = run(settings(steps=1), reward_of_model(model))
    assert math.isfinite(rows[0]["objective/scores"]) and rows[0]["objective/scores"] != 0


def raises(prompts, completions):
    raise KeyError("no such word")


def leaves(prompts, completions):
    raise SystemExit(3)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda p, c: [0.0] * 11, r"must return \(12,\), a number per completion; got \(11,\)"),
        (lambda p, c: 1.0, r"must return \(12,\), a number per completion; got \(\)"),
        (lambda p, c: [0.0] * 3 + [math.nan] + [0.0] * 8, "must be finite; got nan for completion 3, rollout 3"),
        (lambda p, c: [None] * 12, "must return numbers; got list"),
        (lambda p, c: [10**400] * 12, r"must return numbers; got list \(OverflowError: "),
        (lambda p, c: [2**1000] * 12, "must be finite; got inf for completion 0, rollout 3"),
        (lambda p, c: ["1_0"] * 12, "must return numbers; got list"),
        (lambda p, c: torch.zeros(12, device="meta"), r"must return numbers; got Tensor \(TypeError: .* meta device"),
        (lambda p, c: torch.zeros(12, dtype=torch.complex64), r"got Tensor \(TypeError: torch.complex64 has imaginary"),
        (lambda p, c: np.full(12, 1j), r"got ndarray \(TypeError: torch.complex128 has imaginary parts"),
        (lambda p, c: np.full(12, "1"), r"must return numbers; got ndarray \(TypeError: "),
        (lambda p, c: torch.full((12,), 1e300, dtype=torch.float64), "must be finite; got inf for completion 0"),
        (lambda p, c: (0.0 for _ in c), r"must return numbers; got generator"),
        (lambda p, c: {"a": 1.0}, r"must return numbers; got dict"),
        (raises, "raised KeyError at rollout 3: 'no such word'"),
        (leaves, "raised SystemExit at rollout 3: 3"),
    ],
)
def test_a_bad_reward_is_named(function, message):
    with pytest.raises(RewardError, match=message):
        checked_scores(reward_of_lists(function), TWELVE, 3)


def test_a_bad_reward_stops_before_anything_changes():
    state, _ = run(settings(), stop_after=2)
    before = {name: t.clone() for name, t in state.model.state_dict().items()}
    with pytest.raises(RewardError, match="raised SystemExit at rollout 3: 3"):
        run(settings(), reward_of_lists(leaves), state=state)
    assert state.step == 2
    assert all(torch.equal(t, before[name]) for name, t in state.model.state_dict().items())


@pytest.mark.parametrize(
    "as_what",
    [
        list, tuple, np.array, torch.tensor, lambda r: torch.tensor(r).to_sparse(),
        lambda r: [torch.tensor(x) for x in r],
        lambda r: torch.tensor(r, dtype=torch.bfloat16), lambda r: torch.tensor(r, requires_grad=True),
        lambda r: [int(x) for x in r], lambda r: np.array(r, dtype=np.int8), lambda r: [np.float64(x) for x in r],
    ],
)  # fmt: skip
def test_numbers_of_any_kind_are_rewards(as_what):
    rewards = [float(i) for i in range(12)]
    got = checked_scores(reward_of_lists(lambda p, c: as_what(rewards)), TWELVE, 1)
    assert got.dtype == torch.float32 and not got.requires_grad and got.tolist() == rewards
    assert checked_scores(lambda b: [2**70] * 12, TWELVE, 1).tolist() == [2.0**70] * 12


def test_nan_stops_with_the_rollout():
    with pytest.raises(FloatingPointError, match=r"ppo: .* not finite .*rollout 1"):
        run(settings(), reward_of_lists(lambda p, c: [1e37 * (i - 5) for i in range(12)]))
