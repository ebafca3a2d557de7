"""What only the text command has: tokenizers, presets, samples while it trains and after; and its pictures."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cli.commands import CALLS, gpt2, metrics, whole

from primer_fast.cli import main, sample
from primer_fast.cli.train import gpt as train_gpt
from primer_fast.cli.train import gpt_plots
from primer_fast.data import tokenizers
from primer_fast.models.transformer import Transformer, TransformerConfig

pytestmark = pytest.mark.usefixtures("folder", "undrawn")
GPT = CALLS["gpt"]


def train(*more):
    assert main(GPT.argv("run", *more)) == 0


def test_writing_between_two_steps_leaves_training_alone():
    """A sample draws from a generator of its own, not from the one that dropout draws from."""
    train("--sample-tokens", "0")
    assert metrics("run") == metrics(whole("gpt"))


def test_it_writes_after_each_validation(capsys):
    train("--sample-tokens", "20")
    printed = capsys.readouterr().out
    assert printed.count("; it writes\n    ") == 3 and "tokens/s" in printed
    assert len(Path("run/sample.txt").read_text()) == 501


def test_a_run_goes_on_with_its_own_tokenizer(refused):
    """Its file may be gone, and a text with other characters is not encoded by another alphabet."""
    file, text = Path("t.json"), Path("mine.txt")
    text.write_text(Path("words.txt").read_text())
    file.write_text(tokenizers.make("characters", text.read_text()).to_json())
    train("--data", "mine.txt", "--tokenizer", "t.json")
    file.unlink()
    assert main(["train", "gpt", "--out", "run", "--resume"]) == 0
    text.write_text(text.read_text() + "ÄÖ")
    message = refused("train gpt --out run --resume")
    assert "mine.txt: CharacterTokenizer: the text must be made of the" in message


def test_bytes_and_a_folder(capsys):
    Path("texts").mkdir()
    for name in "ab":
        Path("texts", f"{name}.md").write_text(Path("words.txt").read_text() + "é")
    train("--data", "texts", "--tokenizer", "bytes")
    assert "held-out bytes" in capsys.readouterr().out
    assert json.loads(Path("run/transformer.json").read_text())["vocab"] == 256
    assert main(["sample", "run", "--prompt", "世界", "--tokens", "10"]) == 0  # bytes know every character
    assert "世界" in capsys.readouterr().out


def test_presets():
    primer, nano, large = (train_gpt.default_options("builtin", preset) for preset in ("primer", "nanogpt-cpu", "gpt2"))
    assert (primer.norm, primer.positions) == ("post", "sinusoidal") and primer.train.warmup_steps >= 100
    for options in (primer, nano):  # the same size and steps
        assert (options.layers, options.heads, options.width, options.context) == (4, 4, 128, 64)
        assert (options.train.batch_size, options.train.steps, options.train.betas) == (12, 2000, (0.9, 0.99))
    assert (nano.norm, nano.positions, nano.dropout, nano.train.warmup_steps) == ("pre", "learned", 0.0, 100)
    assert (nano.train.lr, nano.train.min_lr) == (1e-3, 1e-4)
    shape = {name: getattr(large, name) for name in train_gpt.OF_THE_MODEL}
    with torch.device("meta"):
        model = Transformer(TransformerConfig(50257, **shape))
    assert sum(p.numel() for p in model.parameters()) == 124_439_808


def test_a_preset_is_the_default_of_the_other_options():
    train("--preset", "nanogpt-cpu", "--positions", "sinusoidal")
    options = json.loads(Path("run/config.json").read_text())["options"]
    assert (options["norm"], options["positions"], options["width"]) == ("pre", "sinusoidal", 16)


def test_sampling(capsys):
    def texts(*more):
        assert main(["sample", str(whole("gpt")), *more]) == 0
        return capsys.readouterr().out

    whole("gpt"), capsys.readouterr()
    argv = ["--prompt", "the ", "--tokens", "30"]
    first = texts(*argv, "--seed", "1")
    assert first.startswith("the ") and len(first) == 35
    assert texts(*argv, "--seed", "1") == first != texts(*argv, "--seed", "2")
    greedy = texts(*argv, "--temperature", "0")
    for same in (["--top-k", "1"], ["--top-p", "1e-9"]):  # only the most probable token is left
        assert texts(*argv, *same) == greedy
    parts = texts(*argv, "--count", "3", "--seed", "1").split("-" * 40 + "\n")
    assert len(parts) == 4 and parts[3] == "" and all(part.startswith("the ") for part in parts[:3])
    assert len(texts("--tokens", "40")) == 41  # without a prompt, beyond the context of 16


def test_a_sample_is_of_the_models_distribution():
    """Greedy text is the argmax of the logits at every position."""
    model, tokenizer = sample.load(whole("gpt"))
    (text,) = sample.run(sample.Options(whole("gpt"), prompt="the c", tokens=8, temperature=0.0))
    tokens = torch.tensor(tokenizer.encode(text))[None]
    assert tokens.shape == (1, 13)
    assert model.eval()(tokens)[0, 4:-1].argmax(dim=-1).tolist() == tokens[0, 5:].tolist()


def test_a_gpt2_checkpoint_writes_and_is_trained_on(capsys, refused):
    package = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(("<|endoftext|>", "[UNK]", "the", "cat", "sat", ".", "mat", "on"))}
    tokenizer = package.Tokenizer(package.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = package.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    gpt2(Path("hf"), 8, tokenizer.to_str())
    assert main(["sample", "hf", "--prompt", "the cat", "--tokens", "8", "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("the cat") and "<|endoftext|>" not in printed

    call = "train gpt --data words.txt --out run --init-from hf --steps 4 --log-every 1 --lr 1e-12 --min-lr 0"
    assert main(call.split()) == 0
    for a, b in zip(*(sample.load(Path(name))[0].parameters() for name in ("run", "hf")), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)
    options = json.loads(Path("run/config.json").read_text())["options"]
    assert (options["width"], options["norm"], options["context"]) == (16, "pre", 12)
    assert options["tokenizer"] == "hf/tokenizer.json" and "held-out tokens" in capsys.readouterr().out
    assert main(["train", "gpt", "--out", "run", "--resume"]) == 0


def test_a_run_without_weights_is_named(refused):
    shutil.copytree(whole("gpt"), "run")
    Path("run/model.safetensors").unlink()
    Path("run/checkpoint.safetensors").unlink()
    message = "no weights yet: the run has neither model.safetensors nor checkpoint.safetensors"
    assert message in refused("sample run")


def test_the_attention_drawn_is_that_of_the_model(monkeypatch):
    drawn = {}
    monkeypatch.setattr(gpt_plots, "attention", lambda path, weights, names, title: drawn.update(w=weights, n=names))
    train("--layers", "2")
    assert len(drawn["w"]) == 2 and drawn["w"][0].shape == (2, 16, 16) and len(drawn["n"]) == 16
    model, tokenizer = sample.load(Path("run"))
    sentence = "".join(drawn["n"]).replace("␣", " ").replace("⏎", "\n")
    want = model.eval().attention_weights(torch.tensor([tokenizer.encode(sentence)]))
    for a, b in zip(drawn["w"], want, strict=True):
        np.testing.assert_allclose(a, b[0].numpy(), atol=1e-6)
