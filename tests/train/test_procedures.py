"""What every procedure is held to: its settings, resuming, accumulation, numbers that are not finite."""

import dataclasses
import math

import pytest
import safetensors.torch
import torch
from procedures import (
    DPO,
    PPO,
    PRE,
    SFT,
    SHAPE,
    UNTIED,
    Language,
    Reward,
    Supervised,
    go_on,
    images,
    mlp,
    start,
    text,
    weights,
)

from primer_fast.data.text import TokenizedText
from primer_fast.train import dpo, language_model, ppo, settings, supervised
from primer_fast.train.settings import LOSSES_OF_TRL_ALONE, DPOConfig, SupervisedConfig
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


def figures(case, **changes):
    """Of the first optimizer step: its row without prefixes, the gradient's norm as applied, how far it moved."""
    once = {"epochs": 1, "minibatches": 1} if isinstance(case, PPO) else {}
    state, config = start(case, steps=1, warmup_steps=0, **once, **changes)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=state.scaler.is_enabled())  # no overflow
    before = weights(state)
    (row,) = go_on(case, state, config)
    gradient = torch.nn.utils.get_total_norm([p.grad for p in state.model.parameters() if p.grad is not None])
    moved = torch.nn.utils.get_total_norm([(w - before[key]).float() for key, w in weights(state).items()])
    return {key.removeprefix("train/"): x for key, x in row.items()}, gradient.item(), moved.item()


@pytest.mark.parametrize("name", FIRST)
def test_the_gradient_is_clipped_and_its_norm_is_that_of_before(name):
    (row, free, _), (clipped_row, clipped, _) = (
        figures(CASES[name], clip_norm=norm) for norm in (None, 0.01)
    )  # fmt: skip
    assert row["grad_norm"] == pytest.approx(free, rel=1e-5) and free > 0.1
    assert clipped_row["grad_norm"] == row["grad_norm"] and clipped == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", [*FIRST, "supervised, sgd"])
def test_lower_precision_takes_about_the_same_step(name, precision):
    """The gradient is clipped and applied as it is, not as the loss scaler enlarged it; weights stay float32."""
    if (name, precision) == ("ppo", "float16"):
        pytest.skip("PPO has no loss scaler, and does not offer it")
    want, narrow = (figures(CASES[name], precision=p) for p in ("float32", precision))
    assert narrow[0]["loss"] == pytest.approx(want[0]["loss"], abs=0.03)
    assert narrow[0]["grad_norm"] == pytest.approx(want[0]["grad_norm"], rel=0.05)
    assert narrow[0]["grad_norm"] != want[0]["grad_norm"], "another precision"
    assert narrow[2] == pytest.approx(want[2], rel=0.03)
    state, _ = start(CASES[name], precision=precision)
    assert state.scaler.is_enabled() == (precision == "float16")
    assert all(w.dtype in (torch.float32, torch.float64) for w in weights(state).values())


@pytest.mark.parametrize("name", FIRST[:-1])  # PPO's rows are of one rollout each
def test_a_row_has_the_means_of_its_steps(name):
    options = {"steps": 2, "eval_every": 9} if name == "language" else {"steps": 2}
    ones, twos = (go_on(CASES[name], *start(CASES[name], log_every=n, **options)) for n in (1, 2))
    assert len(ones) == 2 and len(twos) == 1
    means = [key for key in twos[0] if key.startswith(("rewards/", "logps/")) or key.endswith(("loss", "grad_norm"))]
    for key in set(means) - {"validation/loss", "test/loss"}:
        assert twos[0][key] == pytest.approx((ones[0][key] + ones[1][key]) / 2, rel=1e-6), key


COLUMNS = {
    "supervised": "step epoch train/{loss,accuracy,grad_norm,learning_rate,seconds,samples_per_second}",
    "language": "step tokens train/{loss,grad_norm,learning_rate,seconds,tokens_per_second}",
    "sft": "step epoch loss grad_norm learning_rate train/seconds",
    "reward": "step epoch loss accuracy margin min_reward mean_reward max_reward grad_norm learning_rate train/seconds",
    "dpo": "step epoch loss entropy grad_norm num_tokens learning_rate train/seconds "
    "rewards/{chosen,rejected,margins,accuracies} logps/{chosen,rejected}",
    "ppo": "step episode objective/{kl,entropy,non_score_reward,rlhf_reward,scores} loss grad_norm updates "
    "policy/{approxkl_avg,clipfrac_avg,entropy_avg} loss/{policy_avg,value_avg} kl_coefficient learning_rate "
    "val/{clipfrac_avg,ratio,ratio_var,num_eos_tokens} train/seconds",
}
SOMETIMES = {"supervised": "test/{loss,accuracy}", "language": "validation/loss"}  # 3 steps an epoch; every 2 steps


def spelt_out(names):
    """``a b/{c,d}`` -> {"a", "b/c", "b/d"}"""
    groups = (name.partition("{") for name in names.split())
    return {prefix + name for prefix, _, rest in groups for name in rest.rstrip("}").split(",")}


@pytest.mark.parametrize("name", FIRST)
def test_rows_have_these_figures_all_finite(name):
    state, config = start(CASES[name], log_every=1)
    rows = list(CASES[name].train(state, config, lambda: False))
    always, measured = spelt_out(COLUMNS[name]), spelt_out(SOMETIMES.get(name, ""))
    every = {"supervised": 3, "language": 2}.get(name, 99)
    for row in rows:
        assert set(row) == always | (measured if row["step"] % every == 0 else set()), row["step"]
        assert all(type(x) in (int, float) and math.isfinite(x) for x in row.values())
    assert [row["step"] for row in rows] == list(range(1, state.step + 1))


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
OWN = {  # by procedure
    "supervised": {
        "loss": "hinge", "optimizer": "adam", "augmentation": "flip", "momentum": 0.9, "label_smoothing": 1.0
    },
    "language_model": {"eval_every": 0, "eval_batches": 0},
    "sft": {},
    "reward": {"centring": -1.0},
    "dpo": {"loss": "logistic", "beta": 0.0, "label_smoothing": 0.1},
    "ppo": {
        "minibatches": 65, "max_new_tokens": 0, "temperature": 0.0, "gamma": -0.1, "lam": 1.5, "clip": 1.0,
        "value_clip": 0.0, "value_weight": -1.0, "kl": "k4", "kl_coefficient": -1.0, "kl_target": 0.0, "kl_horizon": 0,
        "stop_kl": 0.0, "missing_end_penalty": -1.0,
    },
}  # fmt: skip
FREE = {"cuda_graphs", "margins", "whiten_rewards"}  # True and False are both right


@pytest.mark.parametrize("config", settings.Optimisation.__subclasses__(), ids=lambda config: config.procedure)
def test_wrong_settings_are_named(config):
    names = {field.name for field in dataclasses.fields(config)}
    wrong = {name: value for name, value in {**SHARED, **OWN[config.procedure]}.items() if name in names}
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


TOGETHER = [  # settings that do not fit each other
    (SupervisedConfig, {"loss": "binary_cross_entropy", "label_smoothing": 0.1}, "label_smoothing must be 0 for"),
    (DPOConfig, {"loss": "robust", "label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\); got 0.5"),
    (DPOConfig, {"loss": "cdpo", "label_smoothing": -0.1}, r"label_smoothing must be in \[0, 0.5\); got -0.1"),
    *((DPOConfig, {"loss": kind}, f"loss must .*; got '{kind}', which TRL has") for kind in LOSSES_OF_TRL_ALONE),
]


@pytest.mark.parametrize(("config", "options", "message"), TOGETHER, ids=lambda x: str(x)[:40])
def test_settings_that_do_not_fit_are_named(config, options, message):
    with pytest.raises(ValueError, match=f"^{config.procedure}: {message}"):
        config(**options)


X, Y = images(11)
TRAIN = {"supervised": supervised.train, "language": language_model.train, "dpo": dpo.train, "ppo": ppo.train}
ONE_PER_INPUT = r"supervised: targets must be \(N,\), one per input, N > 0; got inputs"
TOO_LONG = "ppo: there must be prompts, and with 5 new tokens each must fit the context of 16"
UNFIT = {
    "a target less": ("supervised", (X, Y[:-1]), ONE_PER_INPUT),
    "targets of two axes": ("supervised", (X, Y[:, None]), ONE_PER_INPUT),
    "nothing": ("supervised", (X[:0], Y[:0]), ONE_PER_INPUT),
    "no images": ("supervised, shifted", (X.flatten(1), Y), r"Shift: images must be \(N, H, W\); got \(11, 64\)"),
    "a short text": (
        "language", (TokenizedText(text().train[:16], text().validation),), "must have more than 16 tokens; got 16"
    ),
    "a short text held out": (
        "language", (TokenizedText(text().train, text().validation[:16]),), "must have more than 16 tokens; got 16"
    ),
    "a reference of other pairs": (
        "dpo", (CASES["dpo"].pairs, torch.zeros(9, 2)), r"reference must be \(11, 2\), a row per pair; got \(9, 2\)"
    ),
    "no prompts": ("ppo", ([], None, None), TOO_LONG),
    "a long prompt": ("ppo", ([torch.ones(12, dtype=torch.int64)], None, None), TOO_LONG),
}  # fmt: skip


@pytest.mark.parametrize("what", UNFIT)
def test_data_that_do_not_fit_are_named(what):
    name, data, message = UNFIT[what]
    state, config = start(CASES[name])
    train = TRAIN[name.partition(",")[0]]
    with pytest.raises(ValueError, match=message):
        next(train(state, *data, config, **({"end": 0} if name == "ppo" else {})))
