"""A PPO step: rollout, scores, KL to the reference, advantages, the passes over them; TRL's would stand beside it.

On a GPU with CUDA graphs and without; they hold the passes, not the rollout.
"""

import copy
import dataclasses

import torch

from primer_fast.bench.op import OURS
from primer_fast.bench.peers import NotAvailable
from primer_fast.bench.programs.training_steps import Step, compare_steps
from primer_fast.bench.programs.transformer_step import made, other_way
from primer_fast.bench.report import ProgramRow
from primer_fast.models.actor_critic import ActorCritic
from primer_fast.models.transformer import TransformerConfig
from primer_fast.train import cuda_graphs, ppo
from primer_fast.train.scoring import reward_of_lists

TRL = "TRL's PPOTrainer"
END = 0
CONFIG = ppo.PPOConfig(lr=1e-5, max_new_tokens=53, steps=10**6)  # one training, which ends when it has been timed


def ppo_step(
    device: str, seconds: float, with_compile: bool, small: bool = False, config: ppo.PPOConfig = CONFIG
) -> list[ProgramRow]:
    """Prompts of 32 tokens, new ones to each, scored by a function of the tokens; GPT-2's sizes on a GPU."""
    shape = {"width": 128, "layers": 4, "heads": 4} if device == "cpu" else {"width": 768, "layers": 12, "heads": 12}
    vocab = 4096 if device == "cpu" else 50257
    length = 4 if small else 32
    if device == "cuda":
        config = dataclasses.replace(config, precision="bfloat16")
    if small:
        shape, vocab = {"width": 16, "layers": 1, "heads": 1}, 32
        passes = cuda_graphs.WARM_UP + 1  # up to the replay of a CUDA graph
        config = dataclasses.replace(config, batch_size=2, minibatches=1, epochs=passes, max_new_tokens=2)
    model = TransformerConfig(vocab, 128, **shape, activation="gelu_tanh", norm="pre", positions="learned")

    torch.manual_seed(0)
    first = made(model, device)
    rows = config.batch_size // config.minibatches * (length + config.max_new_tokens)

    def ours(asked: bool | None) -> Step:
        policy = copy.deepcopy(first)
        asking = dataclasses.replace(config, cuda_graphs=asked)
        state = ppo.start(ActorCritic(policy).to(device), asking)
        draw = torch.Generator().manual_seed(0)
        prompts = list(torch.randint(1, model.vocab, (256, length), generator=draw))
        reward = reward_of_lists(lambda before, written: [sum(t % 2 for t in tokens) for tokens in written])
        rollouts = ppo.train(state, prompts, copy.deepcopy(first), reward, asking, end=END)
        return lambda: torch.tensor(next(rollouts)["loss"])

    setting = (
        f"{model.layers} layers, width {model.width}, vocabulary {model.vocab:,}, {config.batch_size} prompts of "
        f"{length} + {config.max_new_tokens} tokens, {config.epochs} passes of {config.minibatches} minibatches"
        + ("" if config.precision == "float32" else f", {config.precision}")
    )
    steps = {OURS: lambda: ours(None), TRL: theirs}
    few = {}
    if device == "cuda":
        other, asked, by_default = other_way(ActorCritic(first), rows)
        steps |= {other: lambda: ours(asked)}
        setting += by_default
        few = {"compared": 1 if small else 2, "least": 3, "small": small}  # steps are long
    return compare_steps(
        "ppo", setting, steps, work=config.batch_size, unit="episodes", seconds=seconds, device=device, **few
    )


def theirs() -> Step:
    """Raises NotAvailable: newer versions of TRL have a PPOTrainer only among their experiments, if at all."""
    raise NotAvailable("no PPOTrainer of trl is driven from here")
