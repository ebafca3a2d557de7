"""Training steps as CUDA graphs against the same steps launched kernel by kernel: equal bit by bit."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from primer_fast.bench.programs.dpo_step import make_pairs
from primer_fast.bench.programs.transformer_step import GPT2_SHAPE, GPT2_VOCAB, PLAIN
from primer_fast.models.actor_critic import ActorCritic
from primer_fast.models.mlp import MLP, MLPConfig
from primer_fast.models.transformer import Transformer, TransformerConfig
from primer_fast.proof.native import CheckedTensor
from primer_fast.proof.on_gpu import compared
from primer_fast.reference.case import Case
from primer_fast.train import dpo, language_model, ppo, supervised
from primer_fast.train.cuda_graphs import WARM_UP, RecordedUpdate, Update
from primer_fast.train.language_model import LanguageModelConfig
from primer_fast.train.settings import Optimisation
from primer_fast.train.state import TrainState
from primer_fast.train.steps import set_learning_rate
from primer_fast.train.supervised import SupervisedConfig

STEPS = WARM_UP + 2  # the last two are replayed
Steps = tuple[TrainState, Update, Optimisation, list[tuple[Tensor, ...]]]  # state, update, its configuration, batches


def _mlp(device: str, small: bool) -> Steps:
    """The perceptron of `primer-fast train mlp`."""
    widths, batch = ((6, 8, 3), 4) if small else ((784, 512, 256, 10), 128)
    config = SupervisedConfig(batch_size=batch, precision="bfloat16")
    inputs = torch.randn(STEPS, batch, widths[0], device=device)
    targets = torch.randint(widths[-1], (STEPS, batch), device=device)
    model = MLP(MLPConfig(widths)).to(device)
    return supervised.start(model, config), supervised.update, config, list(zip(inputs, targets, strict=True))


def _gpt(device: str, small: bool) -> Steps:
    """Two layers of GPT-2's sizes."""
    model = _shape(small)
    config = LanguageModelConfig(batch_size=1 if small else 12, precision="bfloat16")
    windows = torch.randint(model.vocab, (STEPS, config.batch_size, model.context + 1), device=device)
    state = language_model.start(Transformer(model).to(device), config)
    return state, language_model.update, config, [(window,) for window in windows]


def _dpo(device: str, small: bool) -> Steps:
    """The same model on pairs."""
    model = _shape(small)
    config = dpo.DPOConfig(batch_size=2 if small else 8, precision="bfloat16")
    state = dpo.start(Transformer(model).to(device), config)
    pairs = make_pairs(STEPS, config.batch_size, model.context // 2, model.context // 2, model.vocab)
    reference, batches = torch.randn(len(pairs), 2), torch.arange(len(pairs)).split(config.batch_size)
    return state, dpo.update, config, [dpo.batch_of(state, pairs[i], reference[i], config) for i in batches]


def _ppo(device: str, small: bool) -> Steps:
    """The same model as actor and as critic."""
    model = _shape(small)
    config = ppo.PPOConfig(batch_size=2 if small else 16, minibatches=1, precision="bfloat16")
    state = ppo.start(ActorCritic(Transformer(model)).to(device), config)
    half = model.context // (2 if small else 8)
    written = make_pairs(STEPS, config.batch_size, half, half, model.vocab).chosen
    rollout = ppo.Rollout(written.to(device), *torch.randn(4, len(written), 2 * half - 1, device=device))
    rows = torch.arange(len(written)).split(config.batch_size)
    return state, ppo.minibatch_step, config, [ppo.minibatch_of(state, rollout, written, i, config) for i in rows]


def _shape(small: bool) -> TransformerConfig:
    shape = {"context": 8, "width": 16, "heads": 1} if small else GPT2_SHAPE
    return TransformerConfig(16 if small else GPT2_VOCAB, **{**PLAIN, **shape, "layers": 1 if small else 2})


MODELS: dict[str, Callable[[str, bool], Steps]] = {"mlp": _mlp, "gpt": _gpt, "dpo": _dpo, "ppo": _ppo}


def recorded_step(name: str, device: str, small: bool) -> list[CheckedTensor]:
    """Weights, the optimizer's moments and the metrics after some steps of one of ``MODELS``, a row for each."""
    recorded, launched = (_after_steps(name, device, small, record) for record in (True, False))
    case = Case(name, "a step of training", {})
    return compared("graph", "training step", case, torch.bfloat16, [(recorded, launched)])


def _after_steps(name: str, device: str, small: bool, record: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    state, update, config, batches = MODELS[name](device, small)
    if record:
        update = RecordedUpdate(update, state, len(batches[0][0]), name)
    for number, batch in enumerate(batches, 1):
        set_learning_rate(state, dataclasses.replace(config, lr=1e-3 / number, warmup_steps=0), len(batches))
        update(state, *batch, config)
    moments = [t for values in state.optimizer.state.values() for key, t in values.items() if key != "step"]
    return {
        "weights": torch.cat([p.detach().flatten() for p in state.model.parameters()]),
        "moments": torch.cat([t.flatten() for t in moments]),
        **{metric: torch.stack(values).float() for metric, values in state.window.items()},
    }
