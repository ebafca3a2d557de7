"""PPO and DPO land on the known optimum of what they maximise: E[r] - beta KL(pi || pi_ref).

pi*(y | x) = pi_ref(y | x) exp(r(x, y) / beta) / Z(x): Rafailov et al. 2023, eq. 4. Where completions are few, all of it
can be computed: here two tokens after one prompt token, of a vocabulary of five, 25 completions.
"""

import itertools

import pytest
import torch

from primer_fast.data.completions import CompletionPairs, Completions
from primer_fast.models.actor_critic import ActorCritic
from primer_fast.models.transformer import Transformer, TransformerConfig
from primer_fast.train import dpo, ppo
from primer_fast.train.log_probs import token_log_probs

pytestmark = pytest.mark.usefixtures("plain_path")

V, START = 5, 5  # the last token is only ever the prompt
CONFIG = TransformerConfig(vocab=V + 1, context=4, width=16, layers=1, heads=2, norm="pre", positions="learned")
EVERY = Completions(
    torch.tensor([[START, a, b] for a, b in itertools.product(range(V), repeat=2)]),
    torch.ones(V * V, dtype=torch.int64), torch.full((V * V,), 3),
)  # fmt: skip


def make_reference():
    """A random policy that, like all here, never writes the prompt's token."""
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    with torch.no_grad():
        for p in (model.embedding.weight, model.positions):
            p.mul_(8)
    model.head_bias = torch.nn.Parameter(torch.tensor([0.0] * V + [-50.0]), requires_grad=False)
    return model


def log_distribution(model):  # -> (25,) float64
    with torch.no_grad():
        return token_log_probs(model, EVERY).sum(dim=1).double()


def rewards(seed):  # -> (25,) float64
    return torch.randn(V * V, generator=torch.Generator().manual_seed(100 + seed), dtype=torch.float64)


def optimum(reward, beta):
    return (log_distribution(make_reference()) + reward / beta).softmax(dim=0)


def distance(model, target):
    """Total variation: the largest difference in probability of any set of completions."""
    got = log_distribution(model).exp()
    assert got.sum().item() == pytest.approx(1, abs=1e-4), "the completions are not all there is"
    return 0.5 * (got - target).abs().sum().item()


def test_dpo():
    """Every ordered pair, as often as Bradley and Terry's people with this reward would choose so."""
    beta, seed = 0.5, 0
    reward = rewards(seed)
    torch.manual_seed(seed)
    i, j = torch.tensor(list(itertools.permutations(range(V * V), 2))).T
    often = torch.sigmoid(reward[i] - reward[j])
    drawn = torch.multinomial(often, 40000, replacement=True, generator=torch.Generator().manual_seed(seed))
    pairs = CompletionPairs(EVERY[i[drawn]], EVERY[j[drawn]], torch.zeros(len(drawn)))
    config = dpo.DPOConfig(beta=beta, lr=5e-3, batch_size=1000, epochs=5, log_every=1000)
    model = make_reference()
    before = distance(model, optimum(reward, beta))
    reference = dpo.reference_log_probs(make_reference(), pairs, config)
    list(dpo.train(dpo.start(model, config), pairs, reference, config))
    after = distance(model, optimum(reward, beta))
    assert after < 0.05 < 0.5 * before, (before, after)


def test_ppo():
    beta, seed = 2.0, 1
    reward = rewards(seed)
    config = ppo.PPOConfig(
        steps=70, batch_size=512, minibatches=2, epochs=2, max_new_tokens=2, temperature=1.0, kl_coefficient=beta,
        lam=1.0, value_clip=10.0, value_weight=0.5, lr=5e-3, schedule="cosine", seed=seed, log_every=1000,
    )  # fmt: skip
    model = make_reference()
    state = ppo.start(ActorCritic(model), config)
    before = distance(model, optimum(reward, beta))
    score = lambda batch: reward[batch.tokens[:, 1] * V + batch.tokens[:, 2]]  # noqa: E731
    list(ppo.train(state, [torch.tensor([START])], make_reference(), score, config, end=START))
    after = distance(model, optimum(reward, beta))
    assert after < 0.01 < 0.1 * before, (before, after)
