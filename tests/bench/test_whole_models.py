"""The programs beside ours are the same model: equal losses step after step."""

import dataclasses

import pytest
import torch

from primer_fast.bench.goals import CALL_US
from primer_fast.bench.op import EAGER, OURS
from primer_fast.bench.peers import CHUNKED
from primer_fast.bench.programs import (
    generation,
    nanogpt,
    ppo_step,
    supervised_step,
    transformer_step,
    trl_step,
    wrappers,
)
from primer_fast.bench.programs.loss_head import loss_head
from primer_fast.bench.programs.torch_twin import torch_twin
from primer_fast.bench.programs.transformer_step import (
    COMPILED,
    FUSED,
    NANOGPT,
    OURS_COMPILED,
    PLAIN,
    compare,
    nanogpt_step,
)
from primer_fast.bench.timing import Timing
from primer_fast.functional.activation import ACTIVATIONS
from primer_fast.models.cnn import CNN, CNNConfig
from primer_fast.models.mlp import MLP, MLPConfig
from primer_fast.models.transformer import Transformer, TransformerConfig
from primer_fast.train.language_model import LanguageModelConfig

pytestmark = pytest.mark.usefixtures("plain_path")
SMALL = TransformerConfig(19, 8, 16, 2, 2, **PLAIN)
TRAIN = LanguageModelConfig(batch_size=3, warmup_steps=2, steps=20, clip_norm=0.5)
TEXTS = generation.Texts(1, 2, 16, 24, 20, 3, 6, (2,), 3)
TOKENS = torch.randint(19, (500,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_the_twin_from_torchs_modules_is_the_same_model(activation):
    torch.manual_seed(0)
    for model, shape in (
        (MLP(MLPConfig((6, 5, 4), activation, "sigmoid")), (3, 6)),
        (CNN(CNNConfig((2, 7, 8), (3,), 2, 2, (5,), 4, activation)), (3, 2, 7, 8)),
    ):
        inputs = torch.randn(shape)
        torch.testing.assert_close(torch_twin(model)(inputs), model(inputs))


@pytest.mark.parametrize("bias", [False, True])
def test_nanogpt_is_the_same_function(bias):
    torch.manual_seed(0)
    ours = Transformer(dataclasses.replace(SMALL, bias=bias))
    for p in ours.parameters():
        p.data.add_(0.1 * torch.randn_like(p))  # biases and scales start at 0 and 1, where they would not show
    theirs = nanogpt.twin(ours)
    x, y = TOKENS[:24].view(3, 8), TOKENS[1:25].view(3, 8)
    logits, loss = theirs(x, y)
    torch.testing.assert_close(logits, ours(x))
    torch.testing.assert_close(loss, ours.loss(x, y))
    shared = theirs.head.weight is theirs.embedding.weight
    assert shared and sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())


@pytest.mark.parametrize("change", [{"norm": "post"}, {"activation": "relu"}, {"tied": False}, {"kv_heads": 1}])
def test_nanogpt_refuses_what_it_is_not(change):
    with pytest.raises(ValueError, match="NanoGPT: config must be"):
        nanogpt.NanoGPT(dataclasses.replace(SMALL, **change))


def test_only_what_has_two_axes_decays():
    model = nanogpt.twin(Transformer(SMALL))
    decayed, others = nanogpt.optimizer(model, lr=1.0, weight_decay=0.1, betas=(0.9, 0.99), fused=False).param_groups
    assert {p.dim() for p in decayed["params"]} == {2} and {p.dim() for p in others["params"]} == {1}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0)


def test_training_steps_agree_and_are_timed():
    found = {t.provider: t for t in compare("nanogpt", SMALL, TRAIN, TOKENS, "cpu", 0.01, False, {})}
    assert list(found) == [OURS, NANOGPT, FUSED] and {t.status for t in found.values()} == {"ok"}
    assert found[NANOGPT].loss_difference < 1e-4 and found[OURS].unit == "tokens"
    assert found[OURS].rate == pytest.approx(24 / found[OURS].median_ms * 1e3)


@pytest.mark.parametrize("change", [{"lr": 2e-3}, {"clip_norm": 5.0}, {"betas": (0.5, 0.9)}, {"warmup_steps": 0}])
def test_another_setting_is_noticed(monkeypatch, change):
    whole = nanogpt_step

    def other(model, windows, train, **options):
        return whole(model, windows, dataclasses.replace(train, **change), **options)

    monkeypatch.setattr(transformer_step, "nanogpt_step", other)
    found = {t.provider: t for t in compare("nanogpt", SMALL, TRAIN, TOKENS, "cpu", 0.001, False, {})}
    assert found[NANOGPT].status == "wrong" and found[OURS].status == "ok"


def test_the_compiled_one_takes_part_where_asked_for(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda what: compiled.append(what) or what)
    found = [t.provider for t in compare("nanogpt", SMALL, TRAIN, TOKENS, "cpu", 0.001, True, {})]
    assert len(compiled) == 2
    assert found == [OURS, NANOGPT, OURS_COMPILED, COMPILED, FUSED]


def test_flops_per_token():
    weights = 12 * 12 * 768**2 + 50304 * 768  # of GPT-2's products
    model = TransformerConfig(50304, 1024, 768, 12, 12, **PLAIN)
    assert transformer_step.flops_per_token(model) == 6 * weights + 12 * 12 * 768 * 1024


def test_the_digit_models_learn_the_same():
    small = CNN(CNNConfig(channels=(2,), kernel_size=3, hidden=(8,)))
    trials = supervised_step._compare("cnn", "small", small, {}, "cpu", 0.001, False)
    for ours, theirs in (trials, supervised_step.mlp("cpu", 0.001, False)):
        assert ours.status == theirs.status == "ok" and theirs.loss_difference < 1e-5 and theirs.unit == "images"


def test_the_loss_head_saves_memory():
    ours, logits, *others = loss_head("cpu", 0.001, False, rows=512, width=16, vocab=16000)
    assert ours.status == logits.status == "ok" and logits.loss_difference < 1e-4
    there = hasattr(torch.nn, "LinearCrossEntropyOptions")  # not in torch 2.11
    assert {t.provider: t.status for t in others}[CHUNKED] == ("ok" if there else "not available")
    if ours.peak_mib is not None:
        (target,) = ours.targets
        assert target["value"] == ours.peak_mib / logits.peak_mib
        assert logits.peak_mib > 2 * 512 * 16000 * 4 / 2**20 and target["met"], "logits and their gradient"


def test_every_op_has_its_call_measured():
    from primer_fast.bench import op as ops

    trials = wrappers.wrappers("cpu", 0.01, False)
    pairs = list(zip(trials[::2], trials[1::2], strict=True))
    assert [ours.name for ours, _ in pairs] == [f"call of {op}" for op in wrappers.pairs("cpu")]
    assert set(wrappers.pairs("cpu")) == set(ops.names())
    for ours, theirs in pairs:
        assert (ours.provider, theirs.provider) == (OURS, EAGER)
        (target,) = ours.targets
        assert target["what"] == CALL_US.what and ours.unit == "calls"


def test_a_call_is_judged_by_the_median_difference_of_the_rounds(monkeypatch):
    fixed = {OURS: Timing((0.010, 0.050, 0.010)), EAGER: Timing((0.004, 0.041, 0.003))}
    monkeypatch.setattr(wrappers, "time_interleaved", lambda *options: fixed)
    ours, theirs, *_ = wrappers.wrappers("cpu", 1.0, False)
    judged = {"value": pytest.approx(7), "met": False, "ratio": pytest.approx(5 / 7)}
    assert ours.targets == [{"what": CALL_US.what, **judged}] and theirs.targets == []
    assert ours.median_ms == pytest.approx(0.010) and theirs.versus == pytest.approx(0.4)


def test_calls_that_are_compared_compute_the_same():
    for name, (ours, theirs) in wrappers.pairs("cpu").items():
        torch.testing.assert_close(ours().reshape(-1), theirs().reshape(-1), msg=name)


def test_a_ppo_step():
    config = dataclasses.replace(ppo_step.CONFIG, batch_size=2, minibatches=1, epochs=1, max_new_tokens=2)
    ours, theirs = ppo_step.ppo_step("cpu", 0.001, False, config=config)
    assert ours.status == "ok" and ours.unit == "episodes" and ours.rate == pytest.approx(2e3 / ours.median_ms)
    assert theirs.provider == ppo_step.TRL and theirs.status == "not available"


def test_a_dpo_step_beside_trl():
    pytest.importorskip("trl")
    shape = trl_step.Sizes(vocab=40, width=16, layers=1, heads=2, pairs=2, prompt=4, completion=4)
    trials = trl_step.beside_trl(steps=3, shape=shape)
    assert [t.provider for t in trials] == [OURS, trl_step.TRL] * 2 and len({t.setting for t in trials}) == 2
    for ours, theirs in (trials[:2], trials[2:]):
        assert theirs.loss_difference < 1e-4 and ours.samples == theirs.samples == 1
        assert theirs.targets[0]["value"] == theirs.versus and ours.targets == []


def test_equal_texts_are_timed_and_others_are_wrong(monkeypatch):
    found = {row.provider: row for row in generation.compare(TEXTS, "cpu")}
    assert list(found)[:2] == [OURS, generation.NO_CACHE] and {row.status for row in found.values()} == {"ok"}
    assert found[OURS].versus == 1 and found[OURS].rate == pytest.approx(12 / found[OURS].median_ms * 1e3)
    (target,) = found[generation.NO_CACHE].targets
    assert target["value"] == found[generation.NO_CACHE].versus and target["met"] == (target["value"] >= 3)
    whole = generation.generate

    def other(*arguments, **options):
        return whole(*arguments, **options | ({"temperature": 5} if "cache" in options else {}))

    monkeypatch.setattr(generation, "generate", other)
    wrong = {row.provider: row for row in generation.compare(TEXTS, "cpu")}[generation.NO_CACHE]
    assert wrong.status == "wrong" and wrong.median_ms is None and wrong.targets == []
