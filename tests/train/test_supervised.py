import dataclasses
import math

import numpy as np
import pytest
import torch

from primer_fast.models.mlp import MLP, MLPConfig
from primer_fast.train import supervised
from primer_fast.train.steps import epoch_order, learning_rate
from primer_fast.train.supervised import SupervisedConfig, binary_cross_entropy, cross_entropy

SMALL = SupervisedConfig(batch_size=10, epochs=3, warmup_steps=2, log_every=4)


def blobs(samples=47, features=6, classes=3, seed=0):
    """Inputs (N, features) around one centre a class, and their classes (N,)."""
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, classes, (samples,), generator=g)
    centres = 2 * torch.randn(classes, features, generator=g)
    return centres[targets] + torch.randn(samples, features, generator=g), targets


def new_state(config, sizes=(6, 8, 3), activation="tanh", seed=0):
    torch.manual_seed(seed)
    return supervised.start(MLP(MLPConfig(sizes, activation)), config)


def weights(state):
    return torch.cat([p.detach().flatten() for p in state.model.parameters()])


# Losses


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_entropy_is_the_formula(smoothing, reduction):
    rng = np.random.default_rng(0)
    z, y = 5 * rng.standard_normal((20, 7)), rng.integers(0, 7, 20)
    log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    q = (1 - smoothing) * np.eye(7)[y] + smoothing / 7
    want = getattr(np, reduction)(-(q * log_p).sum(axis=1))
    got = cross_entropy(torch.tensor(z), torch.tensor(y), label_smoothing=smoothing, reduction=reduction)
    assert got.item() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("shape", [(20,), (20, 1)])
def test_binary_cross_entropy_is_the_formula_with_its_minus_sign(shape):
    rng = np.random.default_rng(0)
    z, y = 3 * rng.standard_normal(20), rng.integers(0, 2, 20)
    p = 1 / (1 + np.exp(-z))
    want = -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean()
    got = binary_cross_entropy(torch.tensor(z).view(shape), torch.tensor(y, dtype=torch.float32))
    assert got.item() == pytest.approx(want, rel=1e-6)
    misprint = (-y * np.log(p) + (1 - y) * np.log(1 - p)).mean()
    assert abs(got.item() - misprint) > 0.1


def test_binary_cross_entropy_is_finite_at_extreme_logits():
    logits = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    loss = binary_cross_entropy(logits, torch.tensor([0.0, 1.0]))
    loss.backward()
    assert loss.item() == 1e4
    assert logits.grad.tolist() == [[0.5], [-0.5]]


def test_losses_of_bfloat16_logits_are_computed_in_float32():
    logits = torch.randn(5, 3).bfloat16()
    target = torch.tensor([0, 1, 2, 0, 1])
    assert cross_entropy(logits, target).dtype == torch.float32
    assert binary_cross_entropy(logits[:, 0], target.clamp(max=1)).dtype == torch.float32


# The learning rate and the order of the samples


@pytest.mark.parametrize(
    "step, want",
    [(0, 0.25), (1, 0.5), (2, 0.75), (3, 1.0), (8, 0.55), (13, 0.1), (4, 0.1 + 0.45 * (1 + math.cos(0.1 * math.pi)))],
)
def test_warm_up_then_half_a_cosine(step, want):
    assert learning_rate(step, peak=1.0, minimum=0.1, warmup=3, total=13, cosine=True) == pytest.approx(want, rel=1e-12)


def test_constant_rate_after_warm_up():
    rates = [learning_rate(s, peak=0.4, minimum=0.0, warmup=1, total=4, cosine=False) for s in range(4)]
    assert rates == [0.2, 0.4, 0.4, 0.4]


def test_an_epoch_visits_each_sample_once_in_an_order_of_its_own():
    orders = [epoch_order(100, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        assert order.sort().values.tolist() == list(range(100))
    assert len({tuple(order.tolist()) for order in orders}) == 3
    assert torch.equal(orders[1], epoch_order(100, 0, 1))


@pytest.mark.parametrize(
    "samples, batch, epochs, log_every, want",
    [
        (40, 10, 3, 1, list(range(1, 13))),
        (47, 10, 2, 2, [2, 4, 5, 7, 9, 10]),  # 5 steps an epoch
        (47, 10, 2, 5, [5, 10]),
        (47, 10, 5, 12, [10, 20, 25]),  # every second epoch, and the last step
        (40, None, 7, 3, [3, 6, 7]),
    ],
)
def test_logged_steps(samples, batch, epochs, log_every, want):
    config = SupervisedConfig(batch_size=batch, epochs=epochs, log_every=log_every)
    assert [s for s in range(1, 100) if s <= want[-1] and supervised.is_logged(s, samples, config)] == want


# The loop


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_training_learns_and_reports(plain_path, optimizer):
    config = dataclasses.replace(SMALL, optimizer=optimizer, lr=0.03 if optimizer == "adamw" else 0.3, epochs=20)
    data = blobs()
    rows = list(supervised.train(new_state(config), *data, config, test=data))
    assert rows[-1]["step"] == 100 and rows[-1]["epoch"] == 20.0
    assert rows[-1]["train/loss"] < 0.3 * rows[0]["train/loss"] and rows[-1]["test/accuracy"] > 0.95


def test_metrics_are_means_over_samples(plain_path):
    """With a learning rate too small to matter, the mean over the ragged epoch is the loss of the whole data set."""
    config = dataclasses.replace(SMALL, lr=1e-12, epochs=1, log_every=100)
    data, state = blobs(), new_state(SMALL)
    want = supervised.evaluate(state.model, *data, config)
    (row,) = supervised.train(state, *data, config)
    assert row["train/loss"] == pytest.approx(want[0], rel=1e-6) and row["train/accuracy"] == pytest.approx(want[1])


def test_sgd_is_gradient_descent_as_printed(plain_path):
    config = SupervisedConfig(
        optimizer="sgd", lr=0.1, schedule="constant", warmup_steps=0, weight_decay=0.0, batch_size=None,
        clip_norm=None, epochs=1,
    )  # fmt: skip
    (inputs, targets), state = blobs(), new_state(config)
    before = [p.detach().clone() for p in state.model.parameters()]
    gradients = torch.autograd.grad(cross_entropy(state.model(inputs), targets), list(state.model.parameters()))
    list(supervised.train(state, inputs, targets, config))
    for p, w, g in zip(state.model.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(p.detach(), w - 0.1 * g, rtol=1e-5, atol=1e-7)


def test_weights_decay_and_biases_do_not(plain_path):
    config = SupervisedConfig(
        optimizer="sgd", lr=1e-3, schedule="constant", warmup_steps=0, weight_decay=100.0, steps=1
    )
    state = new_state(config)
    with torch.no_grad():
        for p in state.model.parameters():
            p.fill_(1.0)
    inputs = torch.zeros(4, 6)  # tanh of equal biases: all logits are equal and the first layer's gradient is 0
    list(supervised.train(state, inputs, torch.zeros(4, dtype=torch.long), config))
    torch.testing.assert_close(state.model.layers[0].weight, torch.full((8, 6), 0.9))
    assert torch.equal(state.model.layers[0].bias, torch.ones(8))


def test_a_gradient_that_overflows_float16_is_skipped(plain_path):
    config = dataclasses.replace(SMALL, precision="float16", steps=1)
    state = new_state(config)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    before = weights(state)
    (row,) = supervised.train(state, *blobs(), config)
    assert torch.equal(weights(state), before) and row["train/grad_norm"] == math.inf
    assert state.scaler.get_scale() == 2.0**59


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_weights_that_overflow_are_named_when_stopped_between_rows(plain_path):
    config = dataclasses.replace(SMALL, optimizer="sgd", lr=1e38, warmup_steps=0, clip_norm=None, log_every=100)
    (inputs, targets), state = blobs(), new_state(config, sizes=(6, 3))
    with pytest.raises(FloatingPointError, match="a weight is not finite after step 1; a lower lr helps"):
        list(supervised.train(state, 1000 * inputs, targets, config, should_stop=lambda: state.step >= 1))


def test_shift_moves_each_image_by_its_offset():
    images = torch.arange(1, 2 * 5 * 4 + 1, dtype=torch.uint8).view(2, 5, 4)
    shift = supervised.Shift(images)
    padded = np.pad(images.numpy(), ((0, 0), (2, 2), (2, 2)))
    offsets = torch.tensor([[0, 4], [2, 2], [3, 1]])
    index = torch.tensor([1, 0, 1])
    for got, i, (y, x) in zip(shift(index, offsets), index, offsets, strict=True):
        np.testing.assert_array_equal(got, padded[i, y : y + 5, x : x + 4])
    assert torch.equal(shift(index, torch.full((3, 2), 2)), images[index])
    drawn = shift.offsets(0, 0)
    assert drawn.shape == (2, 2) and torch.equal(drawn, shift.offsets(0, 0))
    many = supervised.Shift(torch.zeros(1000, 1, 1))
    assert many.offsets(0, 0).unique().tolist() == [0, 1, 2, 3, 4]
    assert not torch.equal(many.offsets(0, 0), many.offsets(0, 1))


def test_bytes_are_trained_on_as_fractions_of_255(plain_path):
    config = dataclasses.replace(SMALL, augmentation="shift")
    images = torch.randint(0, 256, (30, 2, 3), dtype=torch.uint8, generator=seeded(0))
    targets = torch.randint(0, 3, (30,), generator=seeded(1))
    of_bytes, of_floats = new_state(config), new_state(config)
    list(supervised.train(of_bytes, images, targets, config))
    list(supervised.train(of_floats, images.float() / 255, targets, config))
    torch.testing.assert_close(weights(of_bytes), weights(of_floats), rtol=1e-5, atol=1e-6)
