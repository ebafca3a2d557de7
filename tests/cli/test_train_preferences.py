"""What only the procedures on completions have: one after the other, rewards of the user's, DPO's reference kept."""

import dataclasses
from pathlib import Path

import pytest
import torch
from cli.commands import CALLS, differences, metrics, saved_step, whole

from primer_fast.cli import main
from primer_fast.cli.train import preference_tasks
from primer_fast.data.completions import encode_pairs
from primer_fast.data.preferences import read_preferences
from primer_fast.data.tokenizers import CharacterTokenizer
from primer_fast.models.transformer import Transformer, TransformerConfig
from primer_fast.train.dpo import DPOConfig

pytestmark = pytest.mark.usefixtures("folder", "undrawn")


def call(name, *more, out="run"):
    return main(CALLS[name].argv(out, *more))


def test_one_after_the_other(capsys, refused):
    """The folder of a run is what the next one starts from."""
    assert call("sft", out="sft") == 0
    assert call("reward", "--model", "sft", out="reward") == 0
    assert call("ppo", "--model", "sft", "--reward", "reward", "--shared-critic", out="ppo") == 0
    assert call("dpo", "--model", "ppo", out="dpo") == 0
    Path("words.jsonl").write_text('{"prompt": "", "completion": "good"}\n' * 12)
    assert call("sft", "--data", "words.jsonl", out="learned") == 0
    rated = "".join(f"{r}\t{w}\n" for r, words in ((2, "good fine nice"), (-2, "bad ugly sad")) for w in words.split())
    Path("ratings.tsv").write_text("mean_rating\ttext\n" + rated)
    assert call("reward", "--data", "ratings.tsv", "--held-out", "0.4", out="rated") == 0
    ppo = " ".join(CALLS["ppo"].argv("x", "--reward"))
    assert "sft: not the weights of a reward model" in refused(f"{ppo} sft")
    Path("reward/tokenizer.json").write_text(CharacterTokenizer("\n abcdefghijklmnopqrstuvwxyZ").to_json())
    assert "the reward model must have the policy's tokenizer" in refused(f"{ppo} reward")


def test_the_reference_is_computed_once(monkeypatch):
    pairs = encode_pairs(
        read_preferences("pairs.jsonl"), CharacterTokenizer("\nabcdefghijklmnopqrstuvwxyz").encode, end=0, context=12
    )
    made = []
    original = preference_tasks.dpo.reference_log_probs
    monkeypatch.setattr(preference_tasks.dpo, "reference_log_probs", lambda *a: made.append(1) or original(*a))
    config, path = DPOConfig(), Path("reference.safetensors")
    shape = TransformerConfig(vocab=27, context=12, width=16, layers=1, heads=2)
    model = Transformer(shape)
    first = preference_tasks.cached_reference(path, model, pairs, config)
    assert torch.equal(first, original(model, pairs, config)) and len(made) == 1
    assert torch.equal(preference_tasks.cached_reference(path, model, pairs, config), first) and len(made) == 1
    changes = {
        "weights": (Transformer(shape), pairs, config),
        "data": (model, pairs[torch.arange(len(pairs)).flip(0)], config),
        "precision": (model, pairs, dataclasses.replace(config, precision="bfloat16")),
    }
    for what, arguments in changes.items():
        preference_tasks.cached_reference(path, model, pairs, config)
        count = len(made)
        found = preference_tasks.cached_reference(path, *arguments)
        assert torch.equal(found, original(*arguments)) and len(made) == count + 1, what
    path.write_bytes(path.read_bytes()[:50])
    count = len(made)
    preference_tasks.cached_reference(path, model, pairs, config)
    assert len(made) == count + 1


REWARDS = """
import torch
calls = 0
def nan(prompts, completions):
    return [float("nan")] * len(prompts)
def short(prompts, completions):
    return [0.0]
def raises(prompts, completions):
    raise KeyError("no such word")
def meta(prompts, completions):
    return torch.zeros(len(completions), device="meta")
def large(prompts, completions):
    return [10**400] * len(completions)
def lines(prompts, completions):
    raise ValueError("one\\n  two")
def late(prompts, completions):
    global calls
    calls += 1
    return [float("inf") if calls == 3 else float(len(c)) for c in completions]
constant = 3
"""
FAILURES = {
    "nan": "the reward must be finite; got nan for completion 0, rollout 1",
    "short": "the reward must return (8,), a number per completion; got (1,)",
    "raises": "the reward raised KeyError at rollout 1: 'no such word'",
    "meta": "meta device",
    "large": "OverflowError",
    "lines": "raised ValueError at rollout 1: one two",
    "late": "got inf for completion 0, rollout 3",
}


@pytest.mark.parametrize("function", FAILURES)
def test_a_run_goes_on_after_its_reward_failed(function, monkeypatch, refused):
    module = f"failing_{function}"
    Path(f"{module}.py").write_text(REWARDS)
    call = CALLS["ppo"].words.replace("rewards:length", f"{module}:{function}")
    message = refused(f"{call} --out run", status=1)
    begun = 2 if function == "late" else 0
    assert FAILURES[function] in message
    assert f"the run is saved as of step {begun}: --resume goes on from there" in message
    assert saved_step("run") == begun
    if function == "late":  # which fails once
        assert main(["train", "ppo", "--out", "run", "--resume"]) == 0
        assert metrics("run") == metrics(whole("ppo"))
        assert differences("run", whole("ppo")) == ["checkpoint.safetensors", "config.json"]  # both name the reward


COMPLETIONS = {
    "long prompt": (
        "sft", '{"prompt": "abcdefghijklmnop", "completion": "a"}\n{"prompt": "", "completion": "b"}',
        "bad.jsonl: prompt 0 must fit the context of 12 tokens; got 18, 16 of the prompt",
    ),
    "another alphabet": ("sft", '{"prompt": "", "completion": "A1"}\n' * 2, "made of the 28 characters"),
    "one completion": ("sft", '{"prompt": "", "completion": "b"}', "must hold at least two completions; got 1"),
    "long prompt of ppo": (
        "ppo", '{"prompt": "abcdefghi"}', "prompt 1: must leave room for --max-new-tokens 6 in the context of 12; got 9"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", COMPLETIONS)
def test_completions_that_do_not_fit(case, refused):
    name, content, message = COMPLETIONS[case]
    Path("bad.jsonl").write_text(content)
    assert message in refused(CALLS[name].argv("run", "--prompts" if name == "ppo" else "--data", "bad.jsonl"))
    assert not Path("run").exists()
