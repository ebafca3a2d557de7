"""Proximal policy optimisation of a language model against a reward, held to a frozen reference by a KL penalty.

A rollout is the policy's completions of a batch of prompts. Several passes over it follow, in minibatches; each
minibatch is an optimizer step. The formulas and their sources are in ``ppo_losses``.
Legend: N completions, T tokens; a mask (N, T) is true at completion tokens, and only those count anywhere.
"""

__all__ = [
    "KL_ESTIMATORS",
    "PPOConfig",
    "Rollout",
    "adapted_coefficient",
    "advantages_and_returns",
    "kl_estimate",
    "masked_mean",
    "minibatch_of",
    "minibatch_step",
    "policy_loss",
    "roll_out",
    "shaped_rewards",
    "start",
    "train",
    "update",
    "value_loss",
    "whiten",
]

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as torch_F
from torch import Tensor

from primer_fast.data.completions import Completions
from primer_fast.models.actor_critic import ActorCritic
from primer_fast.models.generation import generate
from primer_fast.models.transformer import Transformer
from primer_fast.train import cuda_graphs, steps
from primer_fast.train.log_probs import to_device, token_log_probs
from primer_fast.train.ppo_losses import (
    adapted_coefficient,
    advantages_and_returns,
    kl_estimate,
    masked_mean,
    policy_loss,
    shaped_rewards,
    value_loss,
    whiten,
)
from primer_fast.train.scoring import Reward, checked_scores
from primer_fast.train.settings import KL_ESTIMATORS, PPOConfig
from primer_fast.train.state import TrainState, generator
from primer_fast.train.steps import (
    autocast,
    clip_gradient,
    record,
    sent,
    set_learning_rate,
    weights_are_finite,
)


@dataclass(frozen=True)
class Rollout:
    """Completions of the policy and what was true of them when it wrote them, (N, T - 1) each."""

    batch: Completions
    log_prob: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


def start(model: ActorCritic, config: PPOConfig) -> TrainState[ActorCritic]:
    """The state before the first rollout of ``model`` on the device that it is on."""
    model.kl_coefficient.fill_(config.kl_coefficient)
    return steps.start(model, config)


def train(
    state: TrainState[ActorCritic],
    prompts: Sequence[Tensor],  # (P,) int64 each, on the CPU
    reference: Transformer,  # frozen; what the KL penalty is against
    reward: Reward,
    config: PPOConfig,
    *,
    end: int,  # the token that ends a completion
    should_stop: Callable[[], bool] = lambda: False,  # asked after each rollout
) -> Iterator[dict[str, float]]:
    """Go on from ``state`` to the last rollout; yield one dict of metrics every ``log_every`` of them.

    ``objective/...`` are means over the completions of a rollout, sums over their tokens: ``kl`` to the reference,
    ``scores``, and ``rlhf_reward``, the score less the penalty. What a rollout sees and draws is a function of
    (seed, rollout), so that a state resumed from ``pack`` goes on bit for bit. Dropout is off.

    Raises:
        ValueError: no prompts, or one that leaves no room for ``max_new_tokens`` in the context.
        RewardError: see there; the state is that of before the rollout.
        FloatingPointError: the loss, the gradient or a weight is no longer finite; says at which rollout.
    """
    context = state.model.policy.config.context
    longest = max((len(prompt) for prompt in prompts), default=0)
    if not longest or longest + config.max_new_tokens > context:
        raise ValueError(
            f"ppo: there must be prompts, and with {config.max_new_tokens} new tokens each must fit the context of "
            f"{context}; got {len(prompts)} prompts of up to {longest} tokens"
        )
    if config.batch_size < state.world.size:
        raise ValueError(
            f"ppo: batch_size must be at least the number of processes, {state.world.size}; got {config.batch_size}"
        )
    state.model.eval()
    reference.eval()
    full = -(-config.batch_size // config.minibatches)
    step = cuda_graphs.recorded(
        minibatch_step, state, asked=config.cuda_graphs, batch=full, procedure="ppo",
        rows=full * (longest + config.max_new_tokens) // config.accumulate,
    )  # fmt: skip
    began = time.perf_counter()
    while state.step < config.steps and not should_stop():
        set_learning_rate(state, config, config.steps)
        rollout, row = roll_out(state, prompts, reference, reward, config, end)
        row |= update(state, rollout, config, step)
        if config.kl_target is not None:
            coefficient = state.model.kl_coefficient
            coefficient.fill_(
                adapted_coefficient(
                    coefficient.item(), row["objective/kl"], config.kl_target, config.batch_size, config.kl_horizon
                )
            )
        if state.step % config.log_every == 0 or state.step == config.steps:
            yield (
                {"step": state.step, "episode": state.step * config.batch_size}
                | row
                | {
                    "kl_coefficient": state.model.kl_coefficient.item(),
                    "learning_rate": float(state.optimizer.param_groups[0]["lr"]),
                    "train/seconds": time.perf_counter() - began,
                }
            )
            began = time.perf_counter()


@torch.no_grad()
def roll_out(
    state: TrainState[ActorCritic],
    prompts: Sequence[Tensor],
    reference: Transformer,
    reward: Reward,
    config: PPOConfig,
    end: int,
) -> tuple[Rollout, dict[str, float]]:
    """Let the policy complete a batch of prompts; score, penalise, estimate advantages. -> rollout, ``objective/``"""
    device = state.model.kl_coefficient.device
    draw = generator(config.seed, 3, state.step)
    chosen = torch.randint(0, len(prompts), (config.batch_size,), generator=draw).tolist()
    world, count, model = state.world, config.batch_size, state.whole()
    part = world.part(count)
    written = generate(
        model.policy, [prompts[i] for i in chosen[part]], max_new_tokens=config.max_new_tokens,
        temperature=config.temperature, stop_tokens=[end], seed=int(torch.randint(0, 2**62, (), generator=draw)),
        place=(part.start, count),
    )  # fmt: skip
    longest = max(len(prompts[i]) for i in chosen) + config.max_new_tokens
    tokens = torch_F.pad(written.tokens, (0, longest - written.tokens.shape[1]), value=end)
    batch = Completions(tokens.clone(), written.prompt_lengths.clone(), written.lengths.clone())
    score = world.together(lambda: checked_scores(reward, batch, state.step + 1)).to(device)
    ended = batch.tokens.gather(1, batch.lengths[:, None] - 1)[:, 0] == end
    score = torch.where(ended, score, score - config.missing_end_penalty)

    mask = batch.mask()
    with autocast(device.type, config.precision):
        hidden, values = model(batch.tokens[:, :-1])
        log_prob = token_log_probs(model.policy, batch, hidden=hidden, temperature=config.temperature)
        ref_log_prob = token_log_probs(reference, batch, temperature=config.temperature)
    # From here on every process has the whole rollout: it is small, and its statistics are of all of it.
    batch = Completions(*(world.gather(x, count) for x in (batch.tokens, batch.prompt_lengths, batch.lengths)))
    score, ended, mask = (world.gather(x, count) for x in (score, ended, mask))
    log_prob, ref_log_prob, values = (world.gather(x, count) for x in (log_prob, ref_log_prob, values))
    kl = kl_estimate(log_prob, ref_log_prob, config.kl)
    coefficient = state.model.kl_coefficient.item()
    rewards = shaped_rewards(kl, score, mask, coefficient)
    if config.whiten_rewards:
        deviation = masked_mean((rewards - masked_mean(rewards, mask)) ** 2, mask).sqrt()
        rewards = rewards / (deviation + 1e-8)
    advantages, returns = advantages_and_returns(rewards, values, mask, config.gamma, config.lam)
    summed = torch.where(mask, kl, 0.0).sum(dim=1)
    row = {
        "objective/kl": torch.where(mask, log_prob - ref_log_prob, 0.0).sum(dim=1).mean().item(),
        "objective/entropy": torch.where(mask, -log_prob, 0.0).sum(dim=1).mean().item(),
        "objective/non_score_reward": (-coefficient * summed).mean().item(),
        "objective/rlhf_reward": (score - coefficient * summed).mean().item(),
        "objective/scores": score.mean().item(),
        "val/num_eos_tokens": ended.sum().item(),
    }
    return Rollout(batch, log_prob, values, whiten(advantages, mask), returns), row


def minibatch_of(
    state: TrainState[ActorCritic],
    rollout: Rollout,
    written: Completions,  # the rollout's, on the CPU
    rows: Tensor,  # (n,) int64, on the CPU
    config: PPOConfig,
) -> tuple[Tensor, ...]:
    """Some completions of a rollout as what ``minibatch_step`` takes between the state and the configuration."""
    device, parts = rollout.values.device, state.world.micro_batches(len(rows), config.accumulate)
    batch = to_device(written[rows], parts, device, written.tokens.shape[1])
    width, index = batch[0].shape[1] - 1, sent(rows, device)
    rest = (rollout.log_prob, rollout.values, rollout.advantages, rollout.returns)
    return *batch, *(x[index, :width] for x in rest)


def minibatch_step(
    state: TrainState[ActorCritic],
    tokens: Tensor,  # (n, T)
    prompt_lengths: Tensor,  # (n,)
    lengths: Tensor,  # (n,)
    places: Tensor,  # (S, M): of the completion tokens of each micro-batch, see ``token_log_probs``
    old_log_prob: Tensor,  # (n, T - 1), and so what follows
    old_values: Tensor,
    advantages: Tensor,
    returns: Tensor,
    config: PPOConfig,
) -> None:
    """One optimizer step on some completions of a rollout; what it measured is appended to ``state.window``."""
    batch = Completions(tokens, prompt_lengths, lengths)
    mask = batch.mask()
    count = mask.sum()
    state.optimizer.zero_grad()
    measured: dict[str, Tensor] = {}
    for micro, where in zip(state.micro_batches(len(tokens), config.accumulate), places, strict=True):
        rows = micro.rows
        part = Completions(tokens[rows], prompt_lengths[rows], lengths[rows])
        with autocast(count.device.type, config.precision):
            log_prob, entropy, values = state.forward(_evaluate, part, where, config.temperature)
        surrogate, found = policy_loss(log_prob, old_log_prob[rows], advantages[rows], mask[rows], config.clip, count)
        error, value_clipfrac = value_loss(
            values, old_values[rows], returns[rows], mask[rows], config.value_clip, count
        )
        loss = micro.counted(surrogate + config.value_weight * error)
        state.backward(loss)
        found |= {
            "loss": loss, "policy_loss": surrogate, "value_loss": error, "value_clipfrac": value_clipfrac,
            "entropy": masked_mean(entropy, mask[rows], count),
        }  # fmt: skip
        measured = {key: measured.get(key, 0) + micro.counted(x.detach()) for key, x in found.items()}
    norm = clip_gradient(state.model, config.clip_norm)
    state.optimizer.step()
    record(state, **state.world.sum(**measured), grad_norm=norm)


def _evaluate(
    model: ActorCritic, batch: Completions, places: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies and values of a rollout's tokens, (N, T - 1) each."""
    hidden, values = model(batch.tokens[:, :-1])
    found = token_log_probs(model.policy, batch, places, hidden=hidden, temperature=temperature, return_entropy=True)
    return *found, values


def update(
    state: TrainState[ActorCritic], rollout: Rollout, config: PPOConfig, step: cuda_graphs.Update = minibatch_step
) -> dict[str, float]:
    """``epochs`` passes over a rollout in minibatches. -> ``policy/``, ``loss/``, ``val/``: means over these.

    step: ``minibatch_step``, or a recording of it.
    """
    rows_of = np.array_split(np.arange(config.batch_size), config.minibatches)
    written, state.window = rollout.batch.to("cpu"), {}
    for epoch in range(config.epochs):
        order = torch.randperm(config.batch_size, generator=generator(config.seed, 4, state.step, epoch))
        for rows in rows_of:
            minibatch = minibatch_of(state, rollout, written, order[torch.from_numpy(rows)], config)
            step(state, *minibatch, config)
        if config.stop_kl is not None and state.window["approxkl"][-1] > config.stop_kl:
            break
    state.step += 1  # a step is a rollout, however many optimizer steps it was worth
    _check_finite(state)
    measured, state.window = state.window, {}
    stacked = {key: torch.stack(values).double() for key, values in measured.items()}
    mean = {key: x.mean().item() for key, x in stacked.items()}
    return {
        "policy/approxkl_avg": mean["approxkl"], "policy/clipfrac_avg": mean["clipfrac"],
        "policy/entropy_avg": mean["entropy"], "loss/policy_avg": mean["policy_loss"],
        "loss/value_avg": mean["value_loss"], "val/clipfrac_avg": mean["value_clipfrac"],
        "val/ratio": mean["ratio"], "val/ratio_var": stacked["ratio"].var(correction=0).item(),
        "loss": mean["loss"], "grad_norm": mean["grad_norm"], "updates": len(measured["loss"]),
    }  # fmt: skip


def _check_finite(state: TrainState[ActorCritic]) -> None:
    """Raise FloatingPointError if anything of the last rollout's updates is not finite."""
    for what in ("loss", "grad_norm"):
        if not torch.stack(state.window[what]).isfinite().all():
            raise FloatingPointError(f"ppo: the {what} is not finite at rollout {state.step}; a lower lr helps")
    if not weights_are_finite(state):
        raise FloatingPointError(f"ppo: a weight is not finite after rollout {state.step}; a lower lr helps")
