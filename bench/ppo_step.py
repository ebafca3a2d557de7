"""A PPO step: rollout, scores, KL to the reference, advantages, the passes over them; beside TRL's if it has one."""

import copy
import dataclasses
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from primer_fast.bench.op import OURS
from primer_fast.bench.peers import NotAvailable
from primer_fast.bench.transformer_step import made
from primer_fast.bench.trial import Trial
from primer_fast.bench.turns import Step, take_turns
from primer_fast.models.actor_critic import ActorCritic
from primer_fast.models.transformer import TransformerConfig
from primer_fast.train import ppo
from primer_fast.train.scoring import reward_of_lists

TRL = "TRL's PPOTrainer"
END = 0
CONFIG = ppo.PPOConfig(lr=1e-5, max_new_tokens=53)


def ppo_step(
    device: str, seconds: float, with_compile: bool, small: bool = False, config: ppo.PPOConfig = CONFIG
) -> list[Trial]:
    """Prompts of 32 tokens, new ones to each, scored by a function of the tokens; GPT-2's sizes on a GPU."""
    shape = {"width": 128, "layers": 4, "heads": 4} if device == "cpu" else {"width": 768, "layers": 12, "heads": 12}
    vocab = 4096 if device == "cpu" else 50257
    length = 4 if small else 32
    if device == "cuda":
        config = dataclasses.replace(config, precision="bfloat16")
    if small:
        shape, vocab = {"width": 16, "layers": 1, "heads": 1}, 32
        config = dataclasses.replace(config, batch_size=2, minibatches=1, epochs=1, max_new_tokens=2)
    model = TransformerConfig(vocab, 128, **shape, activation="gelu_tanh", norm="pre", positions="learned")

    def ours() -> Step:
        torch.manual_seed(0)
        policy = made(model, device)
        reference = copy.deepcopy(policy)
        state = ppo.start(ActorCritic(policy).to(device), config)
        draw = torch.Generator().manual_seed(0)
        prompts = list(torch.randint(1, model.vocab, (256, length), generator=draw))
        reward = reward_of_lists(lambda before, written: [sum(t % 2 for t in tokens) for tokens in written])

        def step():
            _, row = next(enumerate(ppo.train(state, prompts, reference, reward, config, end=END)))
            return torch.tensor(row["loss"])

        return step

    setting = (
        f"{model.layers} layers, width {model.width}, vocabulary {model.vocab:,}, {config.batch_size} prompts of "
        f"{length} + {config.max_new_tokens} tokens, {config.epochs} passes of {config.minibatches} minibatches"
        + ("" if config.precision == "float32" else f", {config.precision}")
    )
    few = {"compared": 1 if small else 2, "least": 3, "small": small} if device == "cuda" else {}  # steps are long
    return take_turns(
        "ppo", setting, {OURS: ours, TRL: theirs}, work=config.batch_size, unit="episodes", seconds=seconds,
        device=device, **few,
    )  # fmt: skip


def theirs() -> Step:
    """Raises NotAvailable: TRL 0.x had a PPOTrainer; what of it there is here, the message says."""
    try:
        installed = version("trl")
    except PackageNotFoundError:
        raise NotAvailable("trl is not installed") from None
    sys.modules.setdefault("kernels", None)  # transformers looks for PyPI's package of that name; our folder is not it
    if find_spec("trl.experimental") is None or find_spec("trl.experimental.ppo") is None:
        raise NotAvailable(f"trl {installed} ships no PPOTrainer")
    raise NotAvailable(f"the PPOTrainer of trl {installed} is experimental and is not driven from here yet")
