import dataclasses
import math

import pytest
import torch

from primer_fast.data.text import TokenizedText, consecutive_windows
from primer_fast.models.transformer import Transformer, TransformerConfig
from primer_fast.train import language_model
from primer_fast.train.language_model import LanguageModelConfig

SMALL = LanguageModelConfig(steps=12, batch_size=5, warmup_steps=2, log_every=4, eval_every=6, eval_batches=2)
pytestmark = pytest.mark.usefixtures("plain_path")


def new_state(config=SMALL, seed=0, **shape):
    torch.manual_seed(seed)
    shape = {"vocab": 11, "context": 8, "width": 16, "layers": 2, "heads": 2, **shape}
    return language_model.start(Transformer(TransformerConfig(**shape)), config)


def text(length=300):
    """Counting modulo 11 with an eleventh of the tokens drawn at random, so that there is something to learn."""
    noise = torch.Generator().manual_seed(0)
    tokens = torch.arange(length) % 11
    wrong = torch.rand(length, generator=noise) < 1 / 11
    tokens[wrong] = torch.randint(0, 11, (int(wrong.sum()),), generator=noise)
    tokens = tokens.to(torch.uint16)
    return TokenizedText(tokens[: -length // 3], tokens[-length // 3 :])


def cross_entropy(model, windows):
    """The mean over all tokens, from the logits in float64."""
    log_p = model(windows[:, :-1]).double().log_softmax(dim=-1)
    return -log_p.gather(-1, windows[:, 1:, None]).mean()


# The loss


def test_the_loss_is_that_of_the_next_token():
    state = new_state()
    windows = language_model.batch(text().train, 8, SMALL, 0)
    want = cross_entropy(state.model, windows).item()
    assert language_model.loss_sum(state.model, windows, SMALL).item() / 40 == pytest.approx(want, rel=1e-5)
    language_model.train_step(state, windows, SMALL)
    assert state.window["loss"][0].item() == pytest.approx(want, rel=1e-5)


def test_the_gradient_is_that_of_the_mean():
    state, config = new_state(), dataclasses.replace(SMALL, clip_norm=None)
    windows = language_model.batch(text().train, 8, config, 0)
    want = torch.autograd.grad(cross_entropy(state.model, windows), list(state.model.parameters()))
    language_model.train_step(state, windows, config)
    for p, g in zip(state.model.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-6)


def test_evaluation_is_over_the_whole_text_or_evenly_spread_windows():
    model, tokens = new_state().model, text().validation
    windows = torch.cat(list(consecutive_windows(tokens, 9, 5)))
    assert windows.shape == (12, 9)
    want = cross_entropy(model, windows).item()
    assert language_model.evaluate(model, tokens, SMALL) == pytest.approx(want, rel=1e-5)
    some = windows[torch.linspace(0, 11, 10).long()]
    want = cross_entropy(model, some).item()
    assert language_model.evaluate(model, tokens, SMALL, batches=2) == pytest.approx(want, rel=1e-5)
    assert model.training


def test_evaluation_is_without_dropout():
    with_dropout, without = new_state(dropout=0.5).model, new_state().model
    losses = [language_model.evaluate(model, text().validation, SMALL) for model in (with_dropout, without)]
    assert losses[0] == losses[1] and with_dropout.training


# Training


@pytest.mark.parametrize("norm, positions", [("post", "sinusoidal"), ("pre", "learned")])
def test_training_learns_and_reports(norm, positions):
    config = dataclasses.replace(SMALL, steps=200, lr=1e-2, min_lr=1e-3, warmup_steps=20, log_every=40, eval_every=100)
    state = new_state(config, norm=norm, positions=positions)
    rows = list(language_model.train(state, text(), config))
    assert [row["step"] for row in rows] == [40, 80, 100, 120, 160, 200]
    assert ["validation/loss" in row for row in rows] == [False, False, True, False, False, True]
    assert rows[0]["train/loss"] > 1.6 and rows[-1]["validation/loss"] < 1.2 < math.log(11)
    last = rows[-1]
    assert last["tokens"] == 200 * 5 * 8 and last["train/grad_norm"] > 0
    assert last["train/learning_rate"] == pytest.approx(1e-3, rel=0.01)
    assert last["train/tokens_per_second"] == pytest.approx(40 * 40 / last["train/seconds"])


def test_windows_are_a_function_of_seed_and_step():
    tokens = text().train
    first = language_model.batch(tokens, 8, SMALL, 3)
    assert torch.equal(first, language_model.batch(tokens, 8, SMALL, 3))
    assert not torch.equal(first, language_model.batch(tokens, 8, SMALL, 4))
    assert not torch.equal(first, language_model.batch(tokens, 8, dataclasses.replace(SMALL, seed=1), 3))
    many = language_model.batch(tokens[:10], 8, dataclasses.replace(SMALL, batch_size=100), 0)
    assert {tuple(w) for w in many.tolist()} == {tuple(tokens[i : i + 9].tolist()) for i in (0, 1)}
