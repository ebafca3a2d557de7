"""train sft, reward, dpo and ppo on files: what they write, resume, and what they say to bad input."""

import dataclasses
import json

import matplotlib.image
import pytest
import safetensors.torch
import torch
from cli.conftest import metrics

from primer_fast.cli import preference_tasks, train_dpo, train_ppo, train_reward, train_sft
from primer_fast.cli.run_folder import RunFolder
from primer_fast.data.completions import encode_pairs
from primer_fast.data.preferences import read_preferences
from primer_fast.data.tokenizers import CharacterTokenizer
from primer_fast.models.transformer import Transformer, TransformerConfig
from primer_fast.train.dpo import DPOConfig

pytestmark = pytest.mark.usefixtures("plain_path")
GOOD, BAD = ["good", "fine", "nice", "great", "lovely", "glad"], ["bad", "ugly", "awful", "poor", "sad", "mean"]
COMMANDS = {"sft": train_sft, "reward": train_reward, "dpo": train_dpo, "ppo": train_ppo}
REWARDS = """
calls = 0
def length(prompts, completions):
    assert set(prompts) <= {"go", "a"} and not any("\\n" in c for c in completions)
    return [len(c) for c in completions]
def nan(prompts, completions):
    return [float("nan")] * len(prompts)
def short(prompts, completions):
    return [0.0]
def raises(prompts, completions):
    raise KeyError("no such word")
def late(prompts, completions):
    global calls
    calls += 1
    return [float("inf") if calls == 3 else float(len(c)) for c in completions]
constant = 3
"""


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with a small policy, completions, preferences, prompts and rewards; the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "rewards_of_test", raising=False)
    torch.manual_seed(0)
    config = TransformerConfig(vocab=27, context=12, width=16, layers=1, heads=2, norm="pre", positions="learned")
    run = RunFolder("base", "train gpt")
    run.begin({}, overwrite=False)
    tokenizer = CharacterTokenizer("\nabcdefghijklmnopqrstuvwxyz")
    run.write_files({
        "transformer.json": json.dumps(dataclasses.asdict(config)), "tokenizer.json": tokenizer.to_json()
    })  # fmt: skip
    run.save_weights(Transformer(config).state_dict())
    rows = [{"prompt": "", "completion": word} for word in GOOD * 2]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"prompt": "", "chosen": g, "rejected": b} for g in GOOD for b in BAD]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "ratings.tsv").write_text(
        "mean_rating\ttext\n" + "".join(f"{r}\t{w}\n" for r, words in ((2, GOOD), (-2, BAD)) for w in words)
    )
    (tmp_path / "prompts.txt").write_text("go\na\n")
    (tmp_path / "rewards_of_test.py").write_text(REWARDS)
    return tmp_path


def arguments(name, *more):
    data = {"sft": "words.jsonl", "reward": "pairs.jsonl", "dpo": "pairs.jsonl"}
    argv = ["--data", data[name]] if name in data else ["--prompts", "prompts.txt", "--max-new-tokens", "6"]
    argv += ["--reward", "rewards_of_test:length"] if name == "ppo" else []
    argv += ["--steps", "6", "--batch-size", "8", "--log-every", "1", "--lr", "0.003", "--model", "base"]
    return [*argv, *more]


def call(name, *more, out="run"):
    return COMMANDS[name].main([*arguments(name, "--out", out), *more])


RESULTS = {"sft": "nats per character", "reward": "right on", "dpo": "moved the right way on", "ppo": "score"}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_run(files, name, capsys):
    assert call(name) == 0
    run = files / "run"
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4, 5, 6]
    assert matplotlib.image.imread(run / "curves.png").shape[1] > 300
    assert (run / "sample.txt").read_text().strip()
    tensors = safetensors.torch.load_file(run / "model.safetensors")
    assert ("trunk.embedding.weight" if name == "reward" else "embedding.weight") in tensors
    before = safetensors.torch.load_file(files / "base" / "model.safetensors")["embedding.weight"]
    assert not torch.equal(before, tensors.get("embedding.weight", tensors.get("trunk.embedding.weight")))
    assert RESULTS[name] in capsys.readouterr().out
    assert COMMANDS[name].main(["--out", "run", "--resume"]) == 0, "of a finished run says the result again"
    assert RESULTS[name] in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_resume_is_the_uninterrupted_run(files, name, stop_and_resume):
    stop_and_resume(lambda argv: COMMANDS[name].main(argv), arguments(name), 3)


def test_one_after_the_other(files, capsys):
    """The folder of a run is what the next one starts from."""
    assert call("sft", out="sft") == 0
    assert call("reward", "--model", "sft", out="reward") == 0
    assert call("ppo", "--model", "sft", "--reward", "reward", "--shared-critic", out="ppo") == 0
    assert call("dpo", "--model", "ppo", out="dpo") == 0
    assert call("reward", "--data", "ratings.tsv", "--held-out", "0.3", out="rated") == 0
    assert call("ppo", "--reward", "sft", out="x") == 2
    assert "sft: not the weights of a reward model" in capsys.readouterr().err


def test_a_reward_model_of_another_tokenizer(files, capsys):
    assert call("reward", out="reward") == 0
    (files / "reward" / "tokenizer.json").write_text(CharacterTokenizer("\nabcdefghijklmnopqrstuvwxyZ").to_json())
    assert call("ppo", "--reward", "reward") == 2
    assert "the reward model must have the policy's tokenizer" in " ".join(capsys.readouterr().err.split())


def test_the_reference_is_computed_once(files, monkeypatch):
    pairs = encode_pairs(
        read_preferences("pairs.jsonl"), CharacterTokenizer("\nabcdefghijklmnopqrstuvwxyz").encode, end=0, context=12
    )
    made = []
    original = preference_tasks.dpo.reference_log_probs
    monkeypatch.setattr(preference_tasks.dpo, "reference_log_probs", lambda *a: made.append(1) or original(*a))
    config, path = DPOConfig(), files / "reference.safetensors"
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


FAILURES = {
    "nan": "the reward must be finite; got nan for completion 0, rollout 1",
    "short": "the reward must return (8,), a number per completion; got (1,)",
    "raises": "the reward raised KeyError at rollout 1: 'no such word'",
}


@pytest.mark.parametrize("function", FAILURES)
def test_a_reward_that_fails(files, function, capsys):
    assert call("ppo", "--reward", f"rewards_of_test:{function}") == 1
    error = capsys.readouterr().err
    assert FAILURES[function] in error and "the run is saved as of step 0: --resume goes on from there" in error
    assert (files / "run" / "checkpoint.safetensors").exists()


def test_a_run_goes_on_after_its_reward_failed(files, capsys):
    assert call("ppo", out="whole") == 0
    assert call("ppo", "--reward", "rewards_of_test:late") == 1
    assert "got inf for completion 0, rollout 3; the run is saved as of step 2" in capsys.readouterr().err
    assert COMMANDS["ppo"].main(["--out", "run", "--resume"]) == 0
    assert metrics(files / "run") == metrics(files / "whole")


def test_divergence(files, capsys):
    assert call("sft", "--lr", "1e30", "--min-lr", "0", "--warmup-steps", "0", "--clip-norm", "None") == 1
    assert "is not finite" in capsys.readouterr().err


CALLS = {
    "malformed": ("dpo", '{"prompt": "", "chosen": "a"\n', "bad.jsonl, line 1: must be a JSON object"),
    "empty completion": (
        "dpo", '{"prompt": "", "chosen": "a", "rejected": ""}', "bad.jsonl, line 1: rejected must not be empty"
    ),
    "empty completion to learn": ("sft", '{"prompt": "", "completion": ""}', "line 1: completion must not be empty"),
    "long prompt": (
        "sft", '{"prompt": "abcdefghijklmnop", "completion": "a"}\n{"prompt": "", "completion": "b"}',
        "bad.jsonl: prompt 0 must fit the context of 12 tokens; got 18, 16 of the prompt",
    ),
    "another alphabet": ("sft", '{"prompt": "", "completion": "A1"}\n' * 2, "made of the 27 characters"),
    "one completion": ("sft", '{"prompt": "", "completion": "b"}', "must hold at least two completions; got 1"),
    "long prompt of ppo": (
        "ppo", '{"prompt": "abcdefghi"}', "prompt 1: must leave room for --max-new-tokens 6 in the context of 12; got 9"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_bad_data(files, case, capsys):
    name, content, message = CALLS[case]
    (files / "bad.jsonl").write_text(content)
    assert call(name, "--prompts" if name == "ppo" else "--data", "bad.jsonl") == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (files / "run").exists()


@pytest.mark.parametrize(
    "reward, message",
    [
        ("nowhere", "must be the folder of a reward model or module:function; got 'nowhere'"),
        ("rewards_of_test:other", "has no attribute 'other'"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("rewards_of_test:constant", "must be a function; got int"),
        ("base", "base: not the weights of a reward model"),
    ],
)
def test_rewards_that_are_none(files, reward, message, capsys):
    assert call("ppo", "--reward", reward) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_model_that_is_none(files, capsys):
    assert call("dpo", "--model", "nowhere") == 2
    assert "nowhere: no such folder" in capsys.readouterr().err
    assert train_ppo.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(option in printed for option in ("--prompts", "--reward", "--kl-target", "--shared-critic"))


@pytest.mark.parametrize("name", ["dpo", "ppo"])
def test_cuda_graphs_on_a_cpu_are_a_warning(files, name):
    with pytest.warns(RuntimeWarning, match=f"{name}: no CUDA graph"):
        assert call(name, "--cuda-graphs", "True", "--device", "cpu") == 0
    assert json.loads((files / "run" / "config.json").read_text())["options"]["train"]["cuda_graphs"] is True


@pytest.mark.parametrize("name", ["dpo", "ppo"])
def test_a_run_from_before_there_was_an_option_goes_on(files, name):
    assert call(name) == 0
    path = files / "run" / "config.json"
    content = json.loads(path.read_text())
    del content["options"]["train"]["cuda_graphs"]
    path.write_text(json.dumps(content))
    before = metrics(files / "run")
    assert call(name, "--resume") == 0
    assert metrics(files / "run") == before
