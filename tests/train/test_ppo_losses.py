"""PPO's definitions, each against another way to compute it."""

import pytest
import torch

from primer_fast.train.ppo import (
    adapted_coefficient,
    advantages_and_returns,
    kl_estimate,
    masked_mean,
    policy_loss,
    shaped_rewards,
    value_loss,
    whiten,
)


@pytest.fixture
def rollout():
    """Six rows of up to nine tokens; completions start and end at different places."""
    g = torch.Generator().manual_seed(0)
    mask = torch.zeros(6, 9, dtype=torch.bool)
    for row, (begin, end) in enumerate([(0, 9), (2, 7), (8, 9), (0, 1), (4, 9), (3, 5)]):
        mask[row, begin:end] = True
    draw = lambda *size: torch.randn(*size, generator=g, dtype=torch.float64)  # noqa: E731
    return mask, draw


def test_gae_is_its_definition(rollout):
    mask, draw = rollout
    rewards, values = torch.where(mask, draw(6, 9), 0.0), draw(6, 9)
    gamma, lam = 0.9, 0.8
    advantages, returns = advantages_and_returns(rewards, values, mask, gamma, lam)
    for row in range(6):
        steps = mask[row].nonzero()[:, 0].tolist()
        v = [values[row, t].item() for t in steps] + [0.0]
        delta = [rewards[row, t].item() + gamma * v[i + 1] - v[i] for i, t in enumerate(steps)]
        for i, t in enumerate(steps):
            want = sum((gamma * lam) ** (j - i) * delta[j] for j in range(i, len(steps)))
            assert advantages[row, t].item() == pytest.approx(want, rel=1e-12)
            assert returns[row, t].item() == pytest.approx(want + v[i], rel=1e-12)
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()


def test_values_outside_the_completion_do_not_matter(rollout):
    mask, draw = rollout
    rewards, values = torch.where(mask, draw(6, 9), 0.0), draw(6, 9)
    other = torch.where(mask, values, draw(6, 9))
    first, second = (advantages_and_returns(rewards, v, mask, 1.0, 0.95) for v in (values, other))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_with_gamma_and_lambda_1_the_return_is_the_sum_of_what_follows(rollout):
    mask, draw = rollout
    rewards = torch.where(mask, draw(6, 9), 0.0)
    _, returns = advantages_and_returns(rewards, draw(6, 9), mask, 1.0, 1.0)
    want = torch.where(mask, rewards.flip(1).cumsum(1).flip(1), 0.0)
    torch.testing.assert_close(returns, want)


def test_the_score_lands_on_the_last_completion_token(rollout):
    mask, draw = rollout
    kl, score = draw(6, 9), draw(6)
    rewards = shaped_rewards(kl, score, mask, 0.3)
    last = [8, 6, 8, 0, 8, 4]
    for row in range(6):
        want = torch.where(mask[row], -0.3 * kl[row], 0.0)
        want[last[row]] += score[row]
        torch.testing.assert_close(rewards[row], want)


def test_whitening_is_over_valid_tokens_with_biased_variance(rollout):
    mask, draw = rollout
    x = 3 + 5 * draw(6, 9)
    white = whiten(x, mask)
    torch.testing.assert_close(white[mask].mean(), torch.tensor(0.0, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(white[mask].var(correction=0), torch.tensor(1.0, dtype=torch.float64))
    assert (white[~mask] == 0).all()
    assert masked_mean(x, mask).item() == pytest.approx(x[mask].mean().item())


def test_the_first_epoch_has_ratio_1_and_the_policy_gradient(rollout):
    mask, draw = rollout
    old, advantages = draw(6, 9), whiten(draw(6, 9), mask)
    new = old.clone().requires_grad_()
    loss, measured = policy_loss(new, old, advantages, mask, 0.2)
    assert measured["ratio"] == 1 and measured["approxkl"] == 0 and measured["clipfrac"] == 0
    (grad,) = torch.autograd.grad(loss, new)
    torch.testing.assert_close(grad, torch.where(mask, -advantages, 0.0) / mask.sum())


def test_the_policy_loss_is_its_formula(rollout):
    mask, draw = rollout
    new, old, advantages = draw(6, 9), draw(6, 9), draw(6, 9)
    loss, measured = policy_loss(new, old, advantages, mask, 0.2)
    rho, a = (new - old).exp()[mask].tolist(), advantages[mask].tolist()
    terms = [max(-x * r, -x * min(1.2, max(0.8, r))) for r, x in zip(rho, a, strict=True)]
    assert loss.item() == pytest.approx(sum(terms) / len(terms))
    clipped = [-x * min(1.2, max(0.8, r)) > -x * r for r, x in zip(rho, a, strict=True)]
    assert measured["clipfrac"].item() == pytest.approx(sum(clipped) / len(clipped))
    assert measured["approxkl"].item() == pytest.approx(0.5 * ((new - old)[mask] ** 2).mean().item())


def test_the_value_loss_is_its_formula(rollout):
    mask, draw = rollout
    values, old, returns = draw(6, 9), draw(6, 9), draw(6, 9)
    loss, share = value_loss(values, old, returns, mask, 0.2)
    triples = zip(*(x[mask].tolist() for x in (values, old, returns)), strict=True)
    errors = [((v - r) ** 2, (min(o + 0.2, max(o - 0.2, v)) - r) ** 2) for v, o, r in triples]
    assert loss.item() == pytest.approx(0.5 * sum(map(max, errors)) / len(errors))
    assert share.item() == pytest.approx(sum(c > u for u, c in errors) / len(errors))


def test_kl_estimators_against_the_exact_kl():
    """Over every action of a small distribution: k1 and k3 are exact in expectation, k2 to second order."""
    g = torch.Generator().manual_seed(1)
    reference = torch.randn(50, generator=g, dtype=torch.float64)
    log_ref = reference.log_softmax(0)
    log_pi = (reference + 0.05 * torch.randn(50, generator=g, dtype=torch.float64)).log_softmax(0)
    pi = log_pi.exp()
    exact = torch.nn.functional.kl_div(log_ref, log_pi, reduction="sum", log_target=True)
    k1, k2, k3 = ((pi * kl_estimate(log_pi, log_ref, kind)).sum() for kind in ("k1", "k2", "k3"))
    torch.testing.assert_close(k1, exact)
    torch.testing.assert_close(k3, exact)
    assert abs(k2 / exact - 1) < 0.05
    assert (kl_estimate(log_pi, log_ref, "k3") >= 0).all() and (kl_estimate(log_pi, log_ref, "k2") >= 0).all()
    variances = [(pi * (kl_estimate(log_pi, log_ref, k) - exact) ** 2).sum() for k in ("k1", "k3")]
    assert variances[1] < variances[0] / 10
    with pytest.raises(ValueError, match="kl must be one of k1, k2, k3; got 'k4'"):
        kl_estimate(log_pi, log_ref, "k4")


def test_the_controller_moves_by_at_most_a_fifth():
    assert adapted_coefficient(0.2, 6.0, 6.0, 64, 10000) == 0.2
    assert adapted_coefficient(0.2, 600.0, 6.0, 100, 1000) == pytest.approx(0.2 * 1.02)
    assert adapted_coefficient(0.2, -5.0, 6.0, 100, 1000) == pytest.approx(0.2 * 0.98)
    assert adapted_coefficient(0.2, 6.6, 6.0, 100, 1000) == pytest.approx(0.2 * 1.01)
