"""Direct preference optimisation: a policy learns from preference pairs alone, held to a frozen reference.

    r = log pi(y | x) - log pi_ref(y | x)        h = r_w - r_l
    sigmoid     -log sigmoid(beta h)
    cdpo        -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)        preferences are wrong with probability e
    robust      (-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)) / (1 - 2 e)        sigmoid's, in the mean over e
    ipo         (h - 1 / (2 beta))^2
    hinge       max(0, 1 - beta h)
    apo_zero    1 - sigmoid(beta r_w) + sigmoid(beta r_l)
    sppo_hard   (r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2
A log-probability of a completion is the sum over its tokens, its end included; in ipo's h it is the mean.
Sources: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; E. Mitchell, "A note on DPO with noisy preferences", 2023;
Chowdhury et al. 2024, arXiv:2403.00409, for robust; Azar et al. 2023, arXiv:2310.12036, eq. 17; Zhao et al. 2023,
arXiv:2305.10425, and Liu et al. 2023, arXiv:2309.06657, for hinge; D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7,
plus 1; Wu et al. 2024, arXiv:2405.00675, eq. 4.7 with 1 as the winner's probability and 0 as the loser's. The names are
TRL's. Erratum: the primer once prints the loss without its minus sign.
Legend: B pairs, T tokens; w won (chosen), l lost (rejected).
"""

__all__ = [
    "LOSSES",
    "DPOConfig",
    "batch_of",
    "preference_loss",
    "ratio_loss",
    "reference_log_probs",
    "start",
    "train",
    "train_step",
    "update",
]

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as torch_F
from torch import Tensor

from primer_fast.data.completions import CompletionPairs, Completions
from primer_fast.models.transformer import Transformer
from primer_fast.train import cuda_graphs
from primer_fast.train.log_probs import to_device, token_log_probs
from primer_fast.train.parallel import ALONE, World
from primer_fast.train.settings import DPO_LOSSES as LOSSES
from primer_fast.train.settings import MARGIN_LOSSES, DPOConfig, check_dpo_loss
from primer_fast.train.state import TrainState
from primer_fast.train.steps import (
    apply_gradient,
    autocast,
    record,
    run_epochs,
    seen_before,
    sent,
    set_learning_rate,
    start,
    total_steps,
)


def preference_loss(h: Tensor, beta: float, kind: str = "sigmoid", label_smoothing: float = 0.0) -> Tensor:
    """h (B,), by how much more than the reference the policy prefers y_w -> loss of each pair (B,).

    Args:
        beta: how hard the policy is held to the reference.
        label_smoothing: e of cdpo and robust.

    Raises:
        ValueError: ``kind`` is none of MARGIN_LOSSES; beta is not positive; label_smoothing is not from 0 to below 0.5,
            or is not 0 where ``kind`` does not know it.
    """
    check_dpo_loss(kind, beta, label_smoothing, MARGIN_LOSSES)
    if kind == "ipo":
        return (h - 1 / (2 * beta)) ** 2
    if kind == "hinge":
        return torch.relu(1 - beta * h)
    right = -torch_F.logsigmoid(beta * h)
    if kind == "sigmoid":
        return right
    e, wrong = label_smoothing, -torch_F.logsigmoid(-beta * h)
    return (1 - e) * right + e * wrong if kind == "cdpo" else ((1 - e) * right - e * wrong) / (1 - 2 * e)


def ratio_loss(
    chosen: Tensor,  # (B,): log pi / pi_ref of y_w
    rejected: Tensor,  # (B,): of y_l
    beta: float,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> Tensor:  # (B,)
    """The loss of each pair, of any kind in LOSSES: ``preference_loss`` of the difference where that is all it needs.

    Raises:
        ValueError: ``kind`` is none of LOSSES, or a number is out of its range, as in ``preference_loss``.
    """
    check_dpo_loss(kind, beta, label_smoothing)
    if kind == "apo_zero":
        return 1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)
    if kind == "sppo_hard":
        return (chosen - 1 / (2 * beta)) ** 2 + (rejected + 1 / (2 * beta)) ** 2
    return preference_loss(chosen - rejected, beta, kind, label_smoothing)


@torch.no_grad()
def reference_log_probs(model: Transformer, pairs: CompletionPairs, config: DPOConfig, world: World = ALONE) -> Tensor:
    """Log-probabilities (N, 2) of chosen and rejected completions under the reference: computed once, then kept.

    world: of processes, each of which has ``model`` and takes a part of the pairs; all get all.
    """
    device, training = next(model.parameters()).device, model.training
    model.eval()
    parts = [torch.empty(0, 2)]
    for rows in torch.arange(len(pairs))[world.part(len(pairs))].split(config.batch_size):
        if len(rows):
            batch = pairs[rows].stacked().to(device)
            with autocast(device.type, config.precision):
                parts.append(token_log_probs(model, batch).sum(dim=1).view(2, -1).T.cpu())
    model.train(training)
    return world.gather(torch.cat(parts), len(pairs))


def train(
    state: TrainState[Transformer],
    pairs: CompletionPairs,
    reference: Tensor,  # (N, 2): reference_log_probs of the same pairs
    config: DPOConfig,
    *,
    should_stop: Callable[[], bool] = lambda: False,  # asked after each step
) -> Iterator[dict[str, float]]:
    """Go on from ``state`` to the last step; yield one dict of metrics per logged step, means since the one before.

    ``rewards/...`` are beta times log pi / pi_ref of the completions, ``rewards/accuracies`` the share of pairs with
    the larger reward on the chosen one, ``entropy`` that of the policy per completion token in nats, ``num_tokens``
    those of prompts and completions of all pairs seen so far. Dropout is off.
    Which pairs a step sees is a function of (seed, step), so that a state resumed from ``pack`` goes on bit for bit.

    Raises:
        ValueError: the reference is not one of these pairs.
        FloatingPointError: the loss, the gradient or a weight is no longer finite; says at which step.
    """
    if reference.shape != (len(pairs), 2):
        raise ValueError(f"dpo: reference must be ({len(pairs)}, 2), a row per pair; got {tuple(reference.shape)}")
    state.model.eval()
    last, lengths = total_steps(len(pairs), config), pairs.chosen.lengths + pairs.rejected.lengths
    full = min(config.batch_size, len(pairs))
    step = cuda_graphs.recorded(
        update, state, asked=config.cuda_graphs, batch=full, procedure="dpo",
        rows=full * int(lengths.sum()) // len(pairs) // config.accumulate,
    )  # fmt: skip
    rows = run_epochs(
        state, len(pairs), config,
        lambda chosen: train_step(state, pairs[chosen], reference[chosen], config, last, step), should_stop,
    )  # fmt: skip
    for row in rows:
        yield row | {"num_tokens": int(seen_before(lengths, int(row["step"]), config))}


def batch_of(
    state: TrainState[Transformer], pairs: CompletionPairs, reference: Tensor, config: DPOConfig
) -> tuple[Tensor, ...]:
    """Pairs, on the CPU, as what ``update`` takes between the state and the configuration."""
    device, parts = next(state.model.parameters()).device, state.world.micro_batches(len(pairs), config.accumulate)
    return sent(reference, device), *to_device(pairs.stacked(), parts, device, state.model.config.context, sides=2)


def update(
    state: TrainState[Transformer],
    reference: Tensor,  # (B, 2)
    tokens: Tensor,  # (2 B, T), those of the chosen ones first
    prompt_lengths: Tensor,  # (2 B,)
    lengths: Tensor,  # (2 B,)
    places: Tensor,  # (S, M): of the completion tokens of each micro-batch, see ``token_log_probs``
    config: DPOConfig,
) -> None:
    """One optimizer step on one batch of pairs; what it measured is appended to ``state.window``."""
    state.optimizer.zero_grad()
    count, measured = len(reference), []
    for micro, where in zip(state.micro_batches(count, config.accumulate), places, strict=True):
        pairs = (x.unflatten(0, (2, count))[:, micro.rows] for x in (tokens, prompt_lengths, lengths))
        batch = Completions(*(x.flatten(0, 1) for x in pairs))
        with autocast(tokens.device.type, config.precision):
            log_probs, entropy = state.forward(token_log_probs, batch, where, return_entropy=True)
        mask = batch.mask()
        ratios = log_probs.sum(dim=1) - reference[micro.rows].T.flatten()  # log pi / pi_ref, (2 B,)
        chosen, rejected = (ratios / mask.sum(dim=1) if config.loss == "ipo" else ratios).chunk(2)
        losses = ratio_loss(chosen, rejected, config.beta, config.loss, config.label_smoothing)
        loss = micro.counted(losses.sum() / count)
        state.backward(loss)
        with torch.no_grad():
            rewards, sums = (config.beta * ratios).chunk(2), log_probs.sum(dim=1).chunk(2)
            found = {
                "loss": loss * count, "rewards/chosen": rewards[0].sum(), "rewards/rejected": rewards[1].sum(),
                "rewards/margins": (rewards[0] - rewards[1]).sum(),
                "rewards/accuracies": (rewards[0] > rewards[1]).sum(),
                "logps/chosen": sums[0].sum(), "logps/rejected": sums[1].sum(),
                "entropy": torch.where(mask, entropy, 0.0).sum(), "tokens": mask.sum(),
            }  # fmt: skip
            measured.append({key: micro.counted(x) for key, x in found.items()})
    norm = apply_gradient(state, config.clip_norm)
    parts: dict[str, Any] = {key: sum(part[key].detach().float() for part in measured) for key in measured[0]}
    total = state.world.sum(**parts)
    tokens = total.pop("tokens")
    record(state, **{key: x / (tokens if key == "entropy" else count) for key, x in total.items()}, grad_norm=norm)


def train_step(
    state: TrainState[Transformer], pairs: CompletionPairs, reference: Tensor, config: DPOConfig, last: int,
    step: cuda_graphs.Update = update,
) -> None:  # fmt: skip
    """``step``, which is ``update`` or a recording of it, on one batch of pairs at the learning rate of its number."""
    set_learning_rate(state, config, last)
    step(state, *batch_of(state, pairs, reference, config), config)
