"""The losses on preference pairs, each against its definition."""

import math

import pytest
import torch

from primer_fast.train.dpo import MARGIN_LOSSES, preference_loss, ratio_loss
from primer_fast.train.reward import pair_loss, wilson_interval
from primer_fast.train.settings import SMOOTHED_LOSSES


def numbers(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_dpo_gradients_push_the_right_way():
    """d loss / d h = -beta sigmoid(-beta h): the larger, the more wrong the order is."""
    h = numbers(7).requires_grad_()
    (grad,) = torch.autograd.grad(preference_loss(h, 0.3).sum(), h)
    torch.testing.assert_close(grad, -0.3 * torch.sigmoid(-0.3 * h.detach()))


def test_cdpo_is_the_mixture_of_both_labels():
    h, wrong = numbers(9), 0.15
    want = (1 - wrong) * preference_loss(h, 0.5) + wrong * preference_loss(-h, 0.5)
    torch.testing.assert_close(preference_loss(h, 0.5, "cdpo", wrong), want)
    torch.testing.assert_close(preference_loss(h, 0.5, "cdpo", 0.0), preference_loss(h, 0.5))


def test_extreme_margins_are_finite():
    h = torch.tensor([-1e4, 1e4], dtype=torch.float32)
    assert preference_loss(h, 1.0).tolist() == [1e4, 0.0]


def test_robust_is_right_in_the_mean_over_wrong_labels():
    """Where a share e of the labels is turned round, its mean is the loss of the true ones: what it is made for."""
    h, e = numbers(9), 0.15
    mean = (1 - e) * preference_loss(h, 0.5, "robust", e) + e * preference_loss(-h, 0.5, "robust", e)
    torch.testing.assert_close(mean, preference_loss(h, 0.5))
    torch.testing.assert_close(preference_loss(h, 0.5, "robust", 0.0), preference_loss(h, 0.5))


def test_hinge_wants_a_margin_of_one():
    h = torch.tensor([-2.0, 0.0, 1.9, 2.0, 7.0], dtype=torch.float64)
    assert preference_loss(h, 0.5, "hinge").tolist() == pytest.approx([2, 1, 0.05, 0, 0])


def test_apo_zero_moves_each_completion_by_itself():
    """1 - sigmoid(beta r_w) + sigmoid(beta r_l): its gradient at one does not know the other."""
    chosen, rejected = numbers(2, 8).requires_grad_().unbind()
    want = [
        1 - 1 / (1 + math.exp(-0.3 * w)) + 1 / (1 + math.exp(-0.3 * r)) for w, r in zip(chosen, rejected, strict=True)
    ]
    loss = ratio_loss(chosen, rejected, 0.3, "apo_zero")
    assert loss.tolist() == pytest.approx(want)
    of_chosen, of_rejected = torch.autograd.grad(loss.sum(), (chosen, rejected))
    slope = lambda r: 0.3 * torch.sigmoid(0.3 * r) * torch.sigmoid(-0.3 * r)  # noqa: E731
    torch.testing.assert_close((of_chosen, of_rejected), (-slope(chosen), slope(rejected)))


def test_sppo_hard_has_its_least_at_its_targets():
    """(r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2"""
    chosen, rejected = numbers(2, 8)
    want = [(w - 2.5) ** 2 + (r + 2.5) ** 2 for w, r in zip(chosen.tolist(), rejected.tolist(), strict=True)]
    assert ratio_loss(chosen, rejected, 0.2, "sppo_hard").tolist() == pytest.approx(want)
    at = torch.tensor([2.5], dtype=torch.float64)
    assert ratio_loss(at, -at, 0.2, "sppo_hard").item() == 0


@pytest.mark.parametrize("kind", MARGIN_LOSSES)
def test_of_ratios_is_of_their_difference(kind):
    chosen, rejected = numbers(2, 8)
    smoothing = 0.1 if kind in SMOOTHED_LOSSES else 0.0
    want = preference_loss(chosen - rejected, 0.4, kind, smoothing)
    assert torch.equal(ratio_loss(chosen, rejected, 0.4, kind, smoothing), want)


def test_reward_loss_is_bradley_terry():
    chosen, rejected = numbers(2, 8)
    want = -torch.log(chosen.exp() / (chosen.exp() + rejected.exp()))
    torch.testing.assert_close(pair_loss(chosen, rejected), want)
    margin = torch.tensor(0.7, dtype=torch.float64)
    torch.testing.assert_close(pair_loss(chosen, rejected + margin), pair_loss(chosen, rejected, margin))
    centred = pair_loss(chosen, rejected, centring=0.1)
    torch.testing.assert_close(centred, want + 0.1 * (chosen + rejected).square())


def test_the_reward_loss_ignores_a_common_shift_unless_centred():
    chosen, rejected = numbers(2, 8)
    torch.testing.assert_close(pair_loss(chosen + 5, rejected + 5), pair_loss(chosen, rejected))
    assert not torch.allclose(
        pair_loss(chosen + 5, rejected + 5, centring=0.1), pair_loss(chosen, rejected, centring=0.1)
    )


@pytest.mark.parametrize(
    ("right", "total", "low", "high"), [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)]
)
def test_wilson_interval(right, total, low, high):
    """Published values: Newcombe 1998, table I (81 of 263), and the closed form at 0 and a half."""
    assert wilson_interval(right, total) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_refuses():
    with pytest.raises(ValueError, match="got 3 of 2"):
        wilson_interval(3, 2)


@pytest.mark.parametrize(
    ("function", "beta", "kind", "smoothing", "message"),
    [
        (preference_loss, 0.1, "apo_zero", 0.0, "loss must be one of sigmoid, cdpo, robust, ipo, hinge; got"),
        (ratio_loss, 0.1, "exo_pair", 0.0, "loss must .*; got 'exo_pair', which TRL has and primer_fast has not"),
        (preference_loss, -1.0, "sigmoid", 0.0, "beta must be positive and finite; got -1.0"),
        (ratio_loss, math.nan, "apo_zero", 0.0, "beta must be positive and finite; got nan"),
        (ratio_loss, 0.1, "sigmoid", 0.3, "label_smoothing must be 0 but for cdpo and robust; got 0.3"),
    ],
)
def test_what_a_loss_cannot_be_is_named(function, beta, kind, smoothing, message):
    """As the settings name it, in the functions themselves."""
    ratios = [torch.zeros(2)] * (1 if function is preference_loss else 2)
    with pytest.raises(ValueError, match=f"dpo: {message}"):
        function(*ratios, beta, kind, smoothing)
