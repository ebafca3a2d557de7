"""Nothing in a training step or a decoding step reads from the device: what a CUDA graph asks for, without a GPU."""

import contextlib
import json

import pytest
import torch
from catalogue import OPS, SAMPLES, run, upstream
from citizenship.no_host_sync import HostSync, NoHostSync
from compiling import printed_where_kernels_compile

from primer_fast import backend
from primer_fast import functional as F
from primer_fast.data.completions import CompletionPairs, Completions
from primer_fast.models.actor_critic import ActorCritic
from primer_fast.models.generation import DecodeStep, Sampling
from primer_fast.models.mlp import MLP, MLPConfig
from primer_fast.models.transformer import Transformer, TransformerConfig
from primer_fast.reference.ops import OPS as REFERENCES
from primer_fast.train import dpo, language_model, ppo, steps, supervised
from primer_fast.train.dpo import DPOConfig
from primer_fast.train.language_model import LanguageModelConfig
from primer_fast.train.ppo import PPOConfig
from primer_fast.train.supervised import SupervisedConfig

FLOATS = torch.tensor([1.0, 0.0, 2.0])
READING = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x[0]),
    "if": lambda x: 1 if x.sum() > 0 else 0,
    "tolist": lambda x: [int(v) for v in x],
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "put by mask": lambda x: x.clone().index_put_((x > 0,), torch.zeros(())),
    "masked_select": lambda x: x.masked_select(x > 0),
    "equal": lambda x: torch.equal(x, x),
    "unique": lambda x: x.unique(),
    "repeats": lambda x: x.repeat_interleave(x.long()),
    "another device": lambda x: x.to("meta"),
}


@pytest.mark.parametrize("way", READING)
def test_it_sees_every_way_to_read(way):
    with pytest.raises(HostSync), NoHostSync():
        READING[way](FLOATS)


@pytest.mark.parametrize("name", OPS)
def test_ops(name, place):
    """Nor does what they allocate depend on what the tensors hold."""
    allocated = []
    for value in (None, 0.0, torch.nan):
        inputs = OPS[name].floats(torch.float32, place)
        dy = upstream(OPS[name].ours(*inputs))
        with torch.no_grad():
            inputs = [x if value is None else x.fill_(value) for x in inputs]
        with NoHostSync() as mode:
            y = OPS[name].ours(*inputs)
            torch.autograd.grad(y, inputs, dy)
        allocated.append(mode.calls)
    assert allocated[0] and allocated[0] == allocated[1] == allocated[2]


INDICES = {
    "embedding": lambda ids: F.embedding(ids, torch.ones(24, 16, device=ids.device, requires_grad=True)),
    "loss": lambda ids: F.linear_cross_entropy(
        torch.ones(6, 16, device=ids.device), torch.ones(24, 16, device=ids.device, requires_grad=True), ids,
        ignore_index=0,
    ),
    "log_prob": lambda ids: F.linear_log_prob(
        torch.ones(6, 16, device=ids.device), torch.ones(24, 16, device=ids.device, requires_grad=True), ids
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", INDICES)
def test_allocation_does_not_depend_on_indices(name, place):
    allocated = []
    for ids in ([1, 2, 3, 4, 5, 6], [7] * 6, [0] * 6):
        ids = torch.tensor(ids, device=place)
        with NoHostSync() as mode:
            INDICES[name](ids).sum().backward()
        allocated.append(mode.calls)
    assert allocated[0] == allocated[1] == allocated[2]


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_every_call(sample, place):
    tensors = sample.make(place, torch.float32)
    if str(sample) == "linear_log_prob: ignored" and not backend.runs_triton(tensors[1]):
        pytest.skip("on a CPU, where nothing waits, targets are looked at")
    with NoHostSync():
        run(sample.call, tensors)


SHAPE = TransformerConfig(vocab=16, context=8, width=16, layers=1, heads=2, dropout=0.1)


def supervised_step(place, **changes):
    """The step of a small perceptron on one batch, to be called."""
    config = SupervisedConfig(**{"batch_size": 6, **changes})
    state = supervised.start(MLP(MLPConfig((16, 8, 3))).to(place), config)
    x, target = torch.randn(6, 16, device=place), torch.randint(0, 3, (6,), device=place)
    return lambda: supervised.update(state, x, target, config)


def language_model_step(place, **changes):
    config = LanguageModelConfig(**{"batch_size": 2, **changes})
    state = language_model.start(Transformer(SHAPE).to(place), config)
    windows = torch.randint(0, 16, (2, 9), device=place)
    return lambda: language_model.update(state, windows, config)


STEPS = {
    "adamw": (supervised_step, {}),
    "sgd": (supervised_step, {"optimizer": "sgd", "momentum": 0.9}),
    "no clipping": (supervised_step, {"clip_norm": None}),
    "accumulate": (supervised_step, {"accumulate": 2}),
    "bfloat16": (supervised_step, {"precision": "bfloat16"}),
    "float16": (supervised_step, {"precision": "float16"}),
    "smoothing": (supervised_step, {"label_smoothing": 0.1}),
    **{
        f"language model {precision} {n}": (language_model_step, {"precision": precision, "accumulate": n})
        for precision in ("float32", "bfloat16", "float16")
        for n in (1, 2)
    },
}


@pytest.mark.parametrize("name", STEPS)
def test_step(name, plain_path):
    """The first step as well as a later one, of which the optimizer and the scaler have seen others."""
    make, changes = STEPS[name]
    step = make("cpu", **changes)
    with NoHostSync() as mode:
        for _ in range(2):
            step()
    assert len(mode.calls) > 40


def test_supervised_loop(plain_path, monkeypatch):
    """Between two rows of metrics, which are the only place where the loop waits."""
    monkeypatch.setattr(steps, "close_window", lambda *_: {})
    monkeypatch.setattr(steps, "check_finite", lambda *_: None)
    config = SupervisedConfig(batch_size=6, epochs=2)
    state = supervised.start(MLP(MLPConfig((16, 8, 3))), config)
    with NoHostSync():
        list(supervised.train(state, torch.rand(20, 16), torch.randint(0, 3, (20,)), config))
    assert state.step == 8


def completions(lengths):
    """Prompts of two tokens with completions of some length; tokens drawn anew."""
    tokens = torch.randint(0, 16, (len(lengths), 8))
    return Completions(tokens, torch.full((len(lengths),), 2), 2 + torch.tensor(lengths))


def dpo_step(place, lengths=(6, 3, 1, 4), **changes):
    """-> the step on a batch with completions of these lengths"""
    config = DPOConfig(**{"batch_size": 2, **changes})
    state = dpo.start(Transformer(SHAPE).to(place).eval(), config)
    pairs = CompletionPairs(completions(lengths[:2]), completions(lengths[2:]), torch.zeros(2))
    batch = dpo.batch_of(state, pairs, torch.randn(2, 2), config)
    return lambda: dpo.update(state, *batch, config)


def ppo_step(place, lengths=(6, 3, 1, 4), critic=None, **changes):
    config = PPOConfig(**{"batch_size": 4, "minibatches": 1, **changes})
    state = ppo.start(ActorCritic(Transformer(SHAPE), critic).to(place).eval(), config)
    written = completions(lengths)
    rollout = ppo.Rollout(written.to(place), *torch.randn(4, 4, 7, device=place))
    batch = ppo.minibatch_of(state, rollout, written, torch.tensor([2, 0, 3, 1]), config)
    return lambda: ppo.minibatch_step(state, *batch, config)


PREFERENCE_STEPS = {
    "dpo": (dpo_step, {}),
    "cdpo": (dpo_step, {"loss": "cdpo", "label_smoothing": 0.1, "accumulate": 2}),
    "ipo": (dpo_step, {"loss": "ipo", "precision": "bfloat16", "clip_norm": None}),
    "dpo float16": (dpo_step, {"precision": "float16"}),
    "ppo": (ppo_step, {}),
    "ppo shared": (ppo_step, {"critic": "shared", "accumulate": 3, "clip_norm": None}),
    "ppo bfloat16": (ppo_step, {"precision": "bfloat16"}),
}


@pytest.mark.parametrize("name", PREFERENCE_STEPS)
def test_preference_step(name, plain_path):
    """What it allocates depends on the sizes of its batch alone: not on which completion is the longest."""
    make, changes = PREFERENCE_STEPS[name]
    allocated = []
    for lengths in ((6, 3, 1, 4), (3, 6, 4, 1)):
        step = make("cpu", lengths, **changes)
        with NoHostSync() as mode:
            for _ in range(2):
                step()
        allocated.append(mode.calls)
    assert len(allocated[0]) > 100 and allocated[0] == allocated[1]


@pytest.mark.parametrize("name", PREFERENCE_STEPS)
def test_preference_step_copies_nothing_from_the_host(name, plain_path, monkeypatch):
    """On tensors without memory, so that a copy between them and the CPU shows; without what knows no such device."""
    make, changes = PREFERENCE_STEPS[name]
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda _: None)
    for procedure in (dpo, ppo):
        monkeypatch.setattr(procedure, "autocast", lambda *_: contextlib.nullcontext())
    step = make("meta", **changes | {"precision": "float32"})
    with NoHostSync():
        step()


@pytest.mark.parametrize("make", [supervised_step, language_model_step, dpo_step, ppo_step])
def test_step_through_the_kernels(make, device):
    step = make(device)
    with NoHostSync():
        step()


@pytest.mark.parametrize("sampling", [Sampling(0), Sampling(0.8, top_k=3, top_p=0.9)], ids=["greedy", "drawn"])
def test_decode_step(sampling, place):
    model = Transformer(SHAPE).to(place).eval()
    with torch.inference_mode():
        cache = model.new_cache(2, 8, fixed=True)
        step = DecodeStep(model, cache, 2, sampling, log_prob=True)
        prompts, lengths = torch.randint(0, 16, (2, 4), device=place), torch.tensor([4, 2], device=place)
        step.choose(model.hidden(prompts, lengths=lengths, cache=cache)[:, -1])
        with NoHostSync():
            for _ in range(2):
                step()


def test_launchers_on_tensors_without_memory():
    """All cases of every op, as they would be launched on an H100: nothing can be read there, and nothing is."""
    seen = json.loads(printed_where_kernels_compile("tests/citizenship/meta_probe.py"))
    assert seen["failed"] == {} and seen["reading is seen"]
    assert seen["launches"].keys() == set(REFERENCES)
    assert all(count >= 4 for count in seen["launches"].values())
