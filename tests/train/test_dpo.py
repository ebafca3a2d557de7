"""Direct preference optimisation of a small transformer."""

import dataclasses
import math

import pytest
import torch
from procedures import DPO, PRE, go_on, start

from primer_fast.models.transformer import Transformer
from primer_fast.train import dpo
from primer_fast.train.log_probs import token_log_probs

pytestmark = pytest.mark.usefixtures("plain_path")
PAIRS = DPO("sigmoid").pairs


def make_model(seed=0):
    torch.manual_seed(seed)
    return Transformer(PRE)


def run(loss, **changes):
    """-> the rows of a policy that starts as the reference"""
    case = DPO(loss, accumulate=1, **changes)
    return go_on(case, *start(case))


def plain_log_probs(model, completions):
    """Row by row, without padding, from the logits."""
    found = []
    for row in range(len(completions)):
        tokens = completions.tokens[row : row + 1, : completions.lengths[row]]
        log_probs = model(tokens[:, :-1]).log_softmax(-1).gather(-1, tokens[:, 1:, None])[0, :, 0]
        found.append(log_probs[completions.prompt_lengths[row] - 1 :])
    return found


def test_log_probs_are_those_of_each_row_by_itself():
    """Neither padding nor the other rows of a batch change any; the end token counts."""
    model, batch = make_model(), PAIRS.stacked()
    got = token_log_probs(model, batch)
    for row, want in enumerate(plain_log_probs(model, batch)):
        torch.testing.assert_close(got[row][batch.mask()[row]], want)
        assert len(want) == batch.lengths[row] - batch.prompt_lengths[row]
        assert (got[row][~batch.mask()[row]] == 0).all()
    junk = dataclasses.replace(batch, tokens=torch.where(batch.tokens == 0, 7, batch.tokens))
    ends = torch.arange(len(batch)), batch.lengths - 1
    junk.tokens[ends] = 0  # the end tokens stay: only the padding is other
    first = batch.prompt_lengths == 1
    junk.tokens[first, 0] = batch.tokens[first, 0]
    torch.testing.assert_close(token_log_probs(model, junk), got, rtol=0, atol=0)


def test_the_side_of_the_padding_changes_no_log_prob():
    """Completions are padded on the right; padded on the left, with a mask, a model gives the same."""
    model, batch = make_model(), PAIRS.stacked()
    want = token_log_probs(model, batch)
    longest = batch.tokens.shape[1]
    for row, length in enumerate(batch.lengths.tolist()):
        left = torch.nn.functional.pad(batch.tokens[row, :length], (longest - length, 0), value=5)[None]
        mask = torch.arange(longest)[None] >= longest - length
        got = model.log_prob(left[:, :-1], left[:, 1:], mask=mask[:, :-1])[0, longest - length :]
        chosen = batch.mask()[row, : length - 1]
        torch.testing.assert_close(got[chosen], want[row, : length - 1][chosen])


FIRST = {"sigmoid": math.log(2), "cdpo": math.log(2), "robust": math.log(2), "ipo": 25, "hinge": 1, "apo_zero": 1,
         "sppo_hard": 50}  # fmt: skip


@pytest.mark.parametrize(("loss", "want"), FIRST.items())
def test_the_first_loss(loss, want):
    rows = run(loss, steps=1)
    assert rows[0]["loss"] == pytest.approx(want, rel=1e-5)
    # Other rows in a batch, and so other sizes, may round otherwise: which, the CPU decides.
    assert rows[0]["rewards/chosen"] == pytest.approx(0, abs=1e-6)
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)


def test_a_tie_is_not_accurate():
    """Every word is as likely as the others, whatever the batch: the policy prefers neither completion."""
    model = make_model()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    config = dpo.DPOConfig(steps=1)
    rows = list(dpo.train(dpo.start(model, config), PAIRS, dpo.reference_log_probs(model, PAIRS, config), config))
    assert rows[0]["rewards/margins"] == rows[0]["rewards/accuracies"] == 0


@pytest.mark.parametrize("loss", dpo.LOSSES)
def test_it_learns_the_preferences(loss):
    rows = run(loss, epochs=25)
    assert rows[-1]["rewards/accuracies"] == 1 and rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["rewards/margins"] > 0 and rows[-1]["rewards/chosen"] > rows[-1]["rewards/rejected"]


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_the_gradient_is_that_of_the_formula(loss):
    """Of the first step, from logits in memory and torch's own operators; ipo takes means over tokens."""
    config, model, twin = dpo.DPOConfig(loss=loss, lr=1e-2, batch_size=11, clip_norm=None), make_model(1), make_model(1)
    reference = dpo.reference_log_probs(make_model(), PAIRS, config)
    dpo.train_step(dpo.start(model, config), PAIRS, reference, config, 1)
    both = []
    for i, side in enumerate((PAIRS.chosen, PAIRS.rejected)):
        rows = plain_log_probs(twin, side)
        ratios = torch.stack([row.sum() for row in rows]) - reference[:, i]
        both.append(ratios / torch.tensor([len(row) for row in rows]) if loss == "ipo" else ratios)
    h = both[0] - both[1]
    losses = (h - 1 / (2 * 0.1)).square() if loss == "ipo" else -torch.nn.functional.logsigmoid(0.1 * h)
    losses.mean().backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
