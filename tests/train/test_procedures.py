"""What every procedure is held to: its settings, resuming, accumulation, numbers that are not finite."""

import dataclasses
import math

import pytest
import safetensors.torch
import torch
from procedures import DPO, PPO, PRE, SFT, SHAPE, UNTIED, Language, Reward, Supervised, go_on, mlp

from primer_fast.train import settings
from primer_fast.train.settings import (
    DPOConfig,
    LanguageModelConfig,
    PPOConfig,
    RewardConfig,
    SFTConfig,
    SupervisedConfig,
)
from primer_fast.train.state import pack, unpack

pytestmark = pytest.mark.usefixtures("plain_path")
SGD = {"optimizer": "sgd", "lr": 0.1}
HEAD = {"head_transform": True, "head_bias": True}  # logits, which no reward is made of, with weights of their own
CASES = {
    "supervised": Supervised(mlp),
    "supervised, sgd": Supervised(mlp, **SGD),
    "supervised, momentum": Supervised(mlp, **SGD, momentum=0.9),
    "supervised, float16": Supervised(mlp, precision="float16"),
    "supervised, shifted": Supervised(mlp, augmentation="shift", accumulate=3),
    "language": Language(),
    "language, dropout": Language(dataclasses.replace(SHAPE, dropout=0.2)),
    "language, pre-LN": Language(UNTIED, accumulate=1),
    "language, float16": Language(precision="float16"),
    "sft": SFT(epochs=2),
    "reward": Reward(epochs=2),
    "reward, head": Reward(dataclasses.replace(PRE, **HEAD), epochs=2),
    "dpo": DPO("sigmoid", epochs=2),
    "dpo, ipo": DPO("ipo", epochs=2, accumulate=1),
    "ppo": PPO(steps=4),  # its KL controller included
    "ppo, shared critic": PPO("shared", steps=4),
}
FIRST = ("supervised", "language", "sft", "reward", "dpo", "ppo")


def start(case, seed=0, **changes):
    torch.manual_seed(seed)
    state, config = case.start()
    return state, dataclasses.replace(config, **changes)


def weights(state):
    return {name: p.detach().clone() for name, p in state.model.state_dict().items()}


@pytest.mark.parametrize("stop", [0, 1, 2, 3])  # at the start, inside a window, at its end, at the end of an epoch
@pytest.mark.parametrize("name", CASES)
def test_resumed_is_uninterrupted_bit_for_bit(name, stop):
    case = CASES[name]
    states = [start(case, log_every=2) for _ in range(2)]
    for state, _ in states:
        state.scaler.set_growth_interval(2)  # where there is one, its scale grows on the way
    (whole, config), (first, _) = states
    torch.manual_seed(5)
    want = go_on(case, whole, config)
    torch.manual_seed(5)
    rows = go_on(case, first, config, stop)
    assert first.step == stop < whole.step
    tensors, metadata = pack(first, dataclasses.asdict(config), epoch=0.5)
    file = safetensors.torch.save(tensors, metadata)
    drawn = torch.randn(3)  # what the interrupted process would have drawn next

    second, _ = start(case, seed=99)
    unpack(second, safetensors.torch.load(file), metadata)
    assert torch.equal(torch.randn(3), drawn)
    unpack(second, safetensors.torch.load(file), metadata)
    rows += go_on(case, second, config)
    assert rows == want and second.scaler.state_dict() == whole.scaler.state_dict()
    a, b = pack(whole, {}, 3.0)[0], pack(second, {}, 3.0)[0]
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


@pytest.mark.parametrize("accumulate", [2, 3, 99])
@pytest.mark.parametrize("name", FIRST)
def test_micro_batches_give_the_step_of_the_batch(name, accumulate):
    """Batches of 4, 5 or 2, and a last one of 3: micro-batches are of unlike sizes."""
    results = []
    for cut in (1, accumulate):
        state, config = start(CASES[name], accumulate=cut, log_every=1)
        results.append((go_on(CASES[name], state, config), weights(state)))
    (want, want_weights), (rows, found) = results
    assert len(rows) == len(want) > 1
    for row, other in zip(rows, want, strict=True):
        assert row == {key: pytest.approx(x, rel=2e-3 if name == "ppo" else 2e-4, abs=1e-5) for key, x in other.items()}
    for key, weight in found.items():
        torch.testing.assert_close(weight, want_weights[key], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("name", FIRST[:-1])  # PPO's rollouts fail before its loss does
def test_a_loss_that_is_not_finite_stops_at_its_step(name):
    state, config = start(CASES[name], log_every=2, **({"eval_every": 4} if name == "language" else {}))
    rows = []
    with pytest.raises(FloatingPointError, match=rf"^{config.procedure}: the loss is not finite at step 3; a lower lr"):
        for row in CASES[name].train(state, config, lambda: False):
            rows.append(row)
            next(state.model.parameters()).data.fill_(math.nan)
    assert [row["step"] for row in rows] == [2]


@pytest.mark.parametrize("name", FIRST)
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(name):
    def run(seed):
        state, config = start(CASES[name])
        rows = go_on(CASES[name], state, dataclasses.replace(config, seed=seed))
        return rows, weights(state)

    one, again, other = run(0), run(0), run(1)
    assert one[0] == again[0] != other[0]
    assert all(torch.equal(t, again[1][key]) for key, t in one[1].items())


SHARED = {
    "lr": 0.0, "min_lr": 1.0, "schedule": "linear", "warmup_steps": -1, "batch_size": 0, "accumulate": 0, "epochs": 0,
    "steps": 0, "betas": (0.9, 1.0), "weight_decay": -0.1, "clip_norm": 0.0, "precision": "fp8", "seed": -1,
    "log_every": 0,
}  # fmt: skip
OWN = {
    SupervisedConfig: {
        "loss": "hinge", "optimizer": "adam", "augmentation": "flip", "momentum": 0.9, "label_smoothing": 1.0
    },
    LanguageModelConfig: {"eval_every": 0, "eval_batches": 0},
    SFTConfig: {},
    RewardConfig: {"centring": -1.0},
    DPOConfig: {"loss": "logistic", "beta": 0.0, "label_smoothing": 0.1},
    PPOConfig: {
        "minibatches": 65, "max_new_tokens": 0, "temperature": 0.0, "gamma": -0.1, "lam": 1.5, "clip": 1.0,
        "value_clip": 0.0, "value_weight": -1.0, "kl": "k4", "kl_coefficient": -1.0, "kl_target": 0.0, "kl_horizon": 0,
        "stop_kl": 0.0, "missing_end_penalty": -1.0,
    },
}  # fmt: skip
FREE = {"cuda_graphs", "margins", "whiten_rewards"}  # True and False are both right


@pytest.mark.parametrize("config", OWN, ids=lambda config: config.procedure)
def test_wrong_settings_are_named(config):
    names = {field.name for field in dataclasses.fields(config)}
    wrong = {name: value for name, value in {**SHARED, **OWN[config]}.items() if name in names}
    assert wrong.keys() == names - FREE, "each setting is tried"
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=rf"^{config.procedure}: {name} must .*; got ") as error:
            config(**{name: value})
        assert str(value) in str(error.value)
    for name in ("lr", "weight_decay", "clip_norm"):
        with pytest.raises(ValueError, match=f"^{config.procedure}: {name} must"):
            config(**{name: math.nan})
    for name in ("accumulate", "log_every"):
        with pytest.raises(ValueError, match=f"^{config.procedure}: {name} must be a positive integer; got True"):
            config(**{name: True})


def test_all_settings_are_in_the_contract():
    configs = {c for c in vars(settings).values() if isinstance(c, type) and issubclass(c, settings.Optimisation)}
    assert configs - {settings.Optimisation} == OWN.keys()
