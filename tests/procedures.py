"""One small training by each procedure, for what all of them are held to.

``start()`` gives the state before the first step and the configuration; ``train(state, config, should_stop)`` goes on.
"""

import copy
import dataclasses

import torch

from primer_fast.data.completions import encode_completions, encode_pairs
from primer_fast.data.preferences import Preference
from primer_fast.data.text import TokenizedText
from primer_fast.models.actor_critic import ActorCritic
from primer_fast.models.mlp import MLP, MLPConfig
from primer_fast.models.reward import RewardModel
from primer_fast.models.transformer import Transformer, TransformerConfig
from primer_fast.train import dpo, language_model, ppo, reward, sft, supervised
from primer_fast.train.scoring import reward_of_lists

device = "cpu"
END = 0
# Without biases: the gradient of a key's is 0 but for rounding, which AdamW blows up to whole steps.
SHAPE = TransformerConfig(vocab=12, context=16, width=16, layers=2, heads=2, bias=False)
PRE = dataclasses.replace(SHAPE, norm="pre", positions="learned", activation="gelu_tanh")
UNTIED = dataclasses.replace(PRE, tied=False)
SMALL = {"lr": 1e-2, "batch_size": 4, "accumulate": 2, "log_every": 1, "warmup_steps": 1}
WORDS = [("ab"[: i % 3], "cd" * (1 + i % 4) + "efg"[: 1 + i % 3]) for i in range(11)]
PAIRS = [Preference(prompt, completion, "gfedc"[: 1 + i % 5], i / 8) for i, (prompt, completion) in enumerate(WORDS)]


def encode(text):
    return [ord(c) - 96 for c in text]


def text():
    tokens = (torch.arange(300) * torch.arange(300) % 11).to(torch.uint16)
    return TokenizedText(tokens[:200], tokens[200:])


def images(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(count, 8, 8, generator=g), torch.randint(0, 3, (count,), generator=g)


def count_of_3(prompts, completions):
    return [float(tokens.count(3)) for tokens in completions]


class Supervised:
    """Eleven samples in batches of four, each in two micro-batches: of the last, of one sample, a process has none."""

    def __init__(self, make, **options):
        self.make, self.options = make, options

    def start(self):
        config = supervised.SupervisedConfig(**{**SMALL, "epochs": 2, **self.options})
        return supervised.start(self.make().to(device), config), config

    def train(self, state, config, should_stop):
        return supervised.train(state, *images(11), config, test=images(5, seed=1), should_stop=should_stop)


class Language:
    def __init__(self, shape=SHAPE, **options):
        self.shape, self.options = shape, options

    def start(self):
        options = {**SMALL, "steps": 4, "batch_size": 5, "eval_every": 2, **self.options}
        config = language_model.LanguageModelConfig(**options)
        return language_model.start(Transformer(self.shape).to(device), config), config

    def train(self, state, config, should_stop):
        return language_model.train(state, text(), config, should_stop=should_stop)


class SFT:
    def __init__(self, **options):
        self.options = options

    def start(self):
        config = sft.SFTConfig(**{**SMALL, **self.options})
        return sft.start(Transformer(PRE).to(device), config), config

    def train(self, state, config, should_stop):
        completions = encode_completions(WORDS, encode, end=END, context=16)
        return sft.train(state, completions, config, should_stop=should_stop)


class Reward:
    """With logits of its trunk's own, that nothing is trained by."""

    def __init__(self, shape=UNTIED, **options):
        self.shape, self.options = shape, options

    def start(self):
        config = reward.RewardConfig(**{**SMALL, "margins": True, "centring": 0.1, **self.options})
        return reward.start(RewardModel(self.shape).to(device), config), config

    def train(self, state, config, should_stop):
        return reward.train(state, encode_pairs(PAIRS, encode, end=END, context=16), config, should_stop=should_stop)


class DPO:
    def __init__(self, loss, shape=PRE, pairs=None, **options):
        self.loss, self.shape, self.options = loss, shape, options
        pairs = encode_pairs(PAIRS, encode, end=END, context=16) if pairs is None else pairs
        self.pairs = pairs[pairs.stacked().lengths.view(2, -1).amax(0) <= shape.context]

    def start(self):
        config = dpo.DPOConfig(**{**SMALL, "loss": self.loss, **self.options})
        return dpo.start(Transformer(self.shape).to(device), config), config

    def train(self, state, config, should_stop):
        torch.manual_seed(0)
        reference = dpo.reference_log_probs(Transformer(self.shape).to(device), self.pairs, config, state.world)
        return dpo.train(state, self.pairs, reference, config, should_stop=should_stop)


class PPO:
    def __init__(self, critic=None, reward=count_of_3, **options):
        self.critic, self.reward, self.options = critic, reward, options

    def start(self):
        config = ppo.PPOConfig(**{
            "steps": 3, "batch_size": 7, "minibatches": 4, "epochs": 2, "max_new_tokens": 5, "temperature": 1.0,
            "lr": 3e-3, "kl_target": 0.1, "kl_horizon": 50, "whiten_rewards": True, **self.options,
        })  # fmt: skip
        return ppo.start(ActorCritic(Transformer(PRE), self.critic).to(device), config), config

    def train(self, state, config, should_stop):
        torch.manual_seed(0)
        prompts = [torch.tensor(p) for p in ([1], [1, 3], [1, 4, 5])]
        reference, function = Transformer(PRE).to(device), reward_of_lists(self.reward)
        return ppo.train(state, prompts, reference, function, config, end=END, should_stop=should_stop)


def mlp():
    return MLP(MLPConfig((64, 16, 3)))


def start(case, seed=0, **changes):
    """The state before the first step, whose weights ``seed`` draws, and the configuration with these changes."""
    torch.manual_seed(seed)
    case = copy.copy(case)
    case.options = {**case.options, **changes}
    return case.start()


def weights(state):
    return {name: t.detach().clone() for name, t in state.model.state_dict().items()}


def go_on(case, state, config, stop=None):
    """Train to the end, or to step ``stop``. -> the rows, but for the times"""
    rows = list(case.train(state, config, lambda: state.step == stop))
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]
