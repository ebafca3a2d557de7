"""What a saved state must say before it is loaded; that it then goes on bit for bit is in test_procedures.py."""

import copy
import json

import pytest
import torch

from primer_fast.models.mlp import MLP, MLPConfig
from primer_fast.train import supervised
from primer_fast.train.state import generator, pack, unpack
from primer_fast.train.steps import make_optimizer
from primer_fast.train.supervised import SupervisedConfig

pytestmark = pytest.mark.usefixtures("plain_path")
CONFIG = SupervisedConfig(batch_size=4, steps=3, log_every=2)


def new_state(config=CONFIG, sizes=(5, 4, 3)):
    torch.manual_seed(0)
    return supervised.start(MLP(MLPConfig(sizes, "tanh")), config)


@pytest.fixture
def saved():
    state = new_state()
    for _ in supervised.train(state, torch.randn(8, 5), torch.randint(0, 3, (8,)), CONFIG):
        pass
    return pack(state, {"lr": CONFIG.lr}, epoch=1.5)


def test_names_and_metadata(saved):
    tensors, metadata = saved
    assert {name.split(".")[0] for name in tensors} == {"model", "optimizer", "rng"}
    assert "model.layers.0.weight" in tensors and "optimizer.layers.1.bias.exp_avg_sq" in tensors
    assert json.loads(metadata["progress"]) == {"step": 3, "epoch": 1.5}
    assert json.loads(metadata["config"]) == {"lr": CONFIG.lr}
    assert all(t.device.type == "cpu" and t.is_contiguous() for t in tensors.values())
    assert all(type(v) is str for v in metadata.values())


def test_a_packed_state_is_a_copy(saved):
    state = new_state()
    unpack(state, *saved)
    tensors, _ = pack(state, {}, epoch=0.0)
    before = tensors["model.layers.0.weight"].clone()
    with torch.no_grad():
        state.model.layers[0].weight.zero_()
    assert torch.equal(tensors["model.layers.0.weight"], before)


def drop(name):
    return lambda tensors, metadata: tensors.pop(name)


def put(name, tensor):
    return lambda tensors, metadata: tensors.update({name: tensor})


def say(key, value):
    return lambda tensors, metadata: metadata.update({key: value})


WRONG = {
    "foreign": (lambda tensors, metadata: metadata.clear(), "not a checkpoint of this version: format must be"),
    "another version": (say("format", "primer_fast checkpoint 0"), "got 'primer_fast checkpoint 0'"),
    "no progress": (lambda tensors, metadata: metadata.pop("progress"), "damaged metadata"),
    "progress cut": (say("progress", '{"step": 3'), "damaged metadata"),
    "step of words": (say("progress", '{"step": "three"}'), "damaged metadata"),
    "negative step": (say("progress", '{"step": -1}'), "damaged metadata"),
    "sgd": (say("optimizer", "SGD"), "made with the optimizer SGD, but this run uses AdamW"),
    "float16": (say("scaler", '{"scale": 2.0}'), "made with another precision"),
    "a weight less": (drop("model.layers.1.bias"), "another model: it has no layers.1.bias, which this model has"),
    "a weight more": (put("model.head.bias", torch.zeros(1)), "it has head.bias, which this model does not have"),
    "another size": (
        put("model.layers.0.weight", torch.zeros(6, 5)),
        r"its layers.0.weight is \(6, 5\) torch.float32, this model's is \(4, 5\) torch.float32",
    ),
    "another dtype": (put("model.layers.0.bias", torch.zeros(4).double()), "layers.0.bias is .* torch.float64"),
    "moment missing": (drop("optimizer.layers.0.weight.exp_avg"), "the state of the optimizer is incomplete"),
    "moment of another size": (
        put("optimizer.layers.0.bias.exp_avg", torch.zeros(3)), r"exp_avg of layers.0.bias must be \(4,\); it is",
    ),
    "no generator": (drop("rng.cpu"), "random number generator is missing"),
    "generator cut": (put("rng.cpu", torch.zeros(7, dtype=torch.uint8)), "missing or of another size"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_named_and_changes_nothing(saved, name):
    change, message = WRONG[name]
    tensors, metadata = saved
    change(tensors, metadata)
    state = new_state()
    before, random = copy.deepcopy(state.model.state_dict()), torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        unpack(state, tensors, metadata)
    assert state.step == 0 and not state.optimizer.state and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(t, before[key]) for key, t in state.model.state_dict().items())


@pytest.mark.parametrize("config", [CONFIG, SupervisedConfig(optimizer="sgd", momentum=0.9, batch_size=4, steps=3)])
def test_the_optimizer_goes_on_in_the_memory_format_of_each_parameter(config):
    """Fused optimizers walk parameter and state by address: in two formats they would mix up the elements."""
    state, other = (
        supervised.start(torch.nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last), config) for _ in "ab"
    )
    x = torch.randn(2, 3, 5, 5)
    for _ in range(2):
        state.model(x).square().sum().backward()
        state.optimizer.step()
    unpack(other, *pack(state, {}, epoch=0.0))
    for s in (state, other):
        s.optimizer.zero_grad()
        s.model(x).square().sum().backward()
        s.optimizer.step()
    assert torch.equal(state.model.weight, other.model.weight)


def test_generators_of_other_streams_are_unrelated():
    draws = {
        tuple(torch.randint(0, 1000, (4,), generator=generator(*key)).tolist())
        for key in ((0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0))
    }
    assert len(draws) == 6


def test_unknown_optimizer_is_named():
    with pytest.raises(ValueError, match="name must be 'adamw' or 'sgd'; got 'lion'"):
        make_optimizer(MLP(MLPConfig((2, 1))), "lion", lr=1.0, weight_decay=0.0, betas=(0.9, 0.9), momentum=0.0)


def test_frozen_parameters_are_not_trained_and_not_saved_by_the_optimizer():
    state = new_state()
    state.model.layers[0].weight.requires_grad_(False)
    state = supervised.start(state.model, CONFIG)
    before = state.model.layers[0].weight.clone()
    list(supervised.train(state, torch.randn(8, 5), torch.randint(0, 3, (8,)), CONFIG))
    assert torch.equal(state.model.layers[0].weight, before)
    tensors, metadata = pack(state, {}, epoch=0.0)
    assert not any(name.startswith("optimizer.layers.0.weight") for name in tensors)
    other = new_state()
    other.model.layers[0].weight.requires_grad_(False)
    unpack(supervised.start(other.model, CONFIG), tensors, metadata)
