"""The text command and what it adds to what the commands that train share; and sampling from its runs."""

import json
import signal
import sys

import matplotlib.image
import numpy as np
import pytest
import safetensors.torch
import torch
from cli.conftest import metrics

from primer_fast.cli import gpt_plots, main, sample, train_gpt
from primer_fast.data import tokenizers
from primer_fast.models.transformer import Transformer, TransformerConfig

pytestmark = pytest.mark.usefixtures("plain_path")
PICTURES = ("curves.png", "attention.png", "positions.png", "embeddings.png")
FILES = ("config.json", "transformer.json", "tokenizer.json", "metrics.jsonl", "checkpoint.safetensors",
         "model.safetensors", *PICTURES, "sample.txt")  # fmt: skip


@pytest.fixture
def drawn():
    """The pictures of the runs of a test are drawn."""


@pytest.fixture(autouse=True)
def not_drawn(request, monkeypatch):
    """They are seconds of work, and most tests are about something else."""
    if "drawn" not in request.fixturenames and "short" in request.fixturenames:
        for name in ("curves", "attention", "positions", "embeddings"):
            monkeypatch.setattr(gpt_plots, name, lambda *_: None)


@pytest.fixture
def text_file(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("the cat sat on the mat, and the rat sat on the cat.\n" * 60)
    return file


@pytest.fixture
def short(text_file, tmp_path):
    """The arguments of a short run of a small model: 12 steps, rows after 3, 6, 9, 12, validations after 6 and 12."""
    argv = ["--data", str(text_file), "--out", str(tmp_path / "run"), "--width", "16", "--layers", "2", "--heads", "2"]
    argv += ["--context", "16", "--batch-size", "4", "--steps", "12", "--warmup-steps", "2", "--log-every", "3"]
    return [*argv, "--eval-every", "6", "--eval-batches", "2", "--sample-tokens", "20"]


@pytest.fixture
def finished(short, tmp_path, capsys):
    assert main(["train", "gpt", *short]) == 0
    capsys.readouterr()
    return tmp_path / "run"


def words_of(captured):
    return " ".join(captured.split())


def test_text_is_learned_written_and_drawn(drawn, short, tmp_path, capsys):
    argv = ["--steps", "200", "--lr", "0.01", "--eval-every", "100", "--log-every", "50", "--warmup-steps", "20"]
    assert train_gpt.main([*short, *argv]) == 0
    out = tmp_path / "run"
    rows = metrics(out)
    assert rows[-1]["step"] == 200 and rows[-1]["validation/loss"] < 0.5 < 1.0 < rows[0]["train/loss"]
    assert sorted(p.name for p in out.iterdir()) == sorted(FILES)
    for name in PICTURES:
        height, width, _ = matplotlib.image.imread(out / name).shape
        assert height > 200 and width > 400
    printed = capsys.readouterr().out
    assert all(name in printed for name in FILES)
    assert "tokens/s" in printed and "validation loss 0." in printed and "nats per character (312 held-out" in printed
    assert printed.count("; it writes\n    ") == 2  # after both validations
    written = (out / "sample.txt").read_text()
    assert len(written) == 501 and sum(written.count(word) for word in ("cat", "sat", "rat", "mat", "the")) > 40


@pytest.mark.parametrize("stop", [6, 9])
def test_resume_is_the_uninterrupted_run(stop, short, tmp_path, stop_and_resume):
    def sample_it(run):  # from the checkpoint
        assert sample.main([str(run), "--tokens", "5"]) == 0

    stop_and_resume(train_gpt.main, [*short, "--dropout", "0.1"], stop, signal.SIGINT, sample_it)
    assert (tmp_path / "run" / "sample.txt").read_text() == (tmp_path / "whole" / "sample.txt").read_text()


def test_writing_between_two_steps_leaves_training_alone(short, tmp_path):
    """A sample draws from a generator of its own, not from the one that dropout draws from."""
    short += ["--dropout", "0.1"]
    assert train_gpt.main(short) == 0
    assert train_gpt.main([*short, "--sample-tokens", "0", "--out", str(tmp_path / "silent")]) == 0
    assert metrics(tmp_path / "run") == metrics(tmp_path / "silent")


def test_a_run_goes_on_with_its_own_tokenizer(short, text_file, tmp_path, capsys):
    """Its file may be gone, and a text with other characters is not encoded by another alphabet."""
    file = tmp_path / "t.json"
    file.write_text(tokenizers.make("characters", text_file.read_text()).to_json())
    assert train_gpt.main([*short, "--tokenizer", str(file)]) == 0
    file.unlink()
    assert train_gpt.main(["--out", str(tmp_path / "run"), "--resume"]) == 0
    text_file.write_text(text_file.read_text() + "ÄÖ")
    assert train_gpt.main(["--out", str(tmp_path / "run"), "--resume"]) == 2
    assert "words.txt: CharacterTokenizer: the text must be made of the" in words_of(capsys.readouterr().err)


def test_divergence_ends_with_the_step(short, capsys):
    assert train_gpt.main([*short, "--lr", "1e30", "--min-lr", "0", "--warmup-steps", "0", "--clip-norm", "None"]) == 1
    assert "not finite" in capsys.readouterr().err


def test_bytes_and_a_folder(short, text_file, tmp_path, capsys):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.md").write_text(text_file.read_text() + "é")
    assert train_gpt.main([*short, "--data", str(folder), "--tokenizer", "bytes"]) == 0
    assert "held-out bytes" in capsys.readouterr().out
    run = tmp_path / "run"
    assert json.loads((run / "transformer.json").read_text())["vocab"] == 256
    assert sample.main([str(run), "--prompt", "世界", "--tokens", "10"]) == 0  # bytes know every character
    assert "世界" in capsys.readouterr().out


def test_presets():
    primer, nano, gpt2 = (train_gpt.default_options("builtin", preset) for preset in ("primer", "nanogpt-cpu", "gpt2"))
    assert (primer.norm, primer.positions) == ("post", "sinusoidal") and primer.train.warmup_steps >= 100
    for options in (primer, nano):  # the same size and steps
        assert (options.layers, options.heads, options.width, options.context) == (4, 4, 128, 64)
        assert (options.train.batch_size, options.train.steps, options.train.betas) == (12, 2000, (0.9, 0.99))
    assert (nano.norm, nano.positions, nano.dropout, nano.train.warmup_steps) == ("pre", "learned", 0.0, 100)
    assert (nano.train.lr, nano.train.min_lr) == (1e-3, 1e-4)
    shape = {name: getattr(gpt2, name) for name in train_gpt.OF_THE_MODEL}
    with torch.device("meta"):
        model = Transformer(TransformerConfig(50257, **shape))
    assert sum(p.numel() for p in model.parameters()) == 124_439_808


def test_a_preset_is_the_default_of_the_other_options(short, tmp_path):
    assert train_gpt.main([*short, "--preset", "nanogpt-cpu", "--positions", "sinusoidal"]) == 0
    options = json.loads((tmp_path / "run" / "config.json").read_text())["options"]
    assert (options["norm"], options["positions"], options["width"]) == ("pre", "sinusoidal", 16)


# Sampling


def texts(argv, capsys):
    assert main(["sample", *argv]) == 0
    return capsys.readouterr().out


def test_sampling(finished, capsys):
    argv = [str(finished), "--prompt", "the ", "--tokens", "30"]
    first = texts([*argv, "--seed", "1"], capsys)
    assert first.startswith("the ") and len(first) == 35
    assert texts([*argv, "--seed", "1"], capsys) == first != texts([*argv, "--seed", "2"], capsys)
    greedy = texts([*argv, "--temperature", "0"], capsys)
    for same in (["--top-k", "1"], ["--top-p", "1e-9"]):  # only the most probable token is left
        assert texts([*argv, *same], capsys) == greedy
    parts = texts([*argv, "--count", "3", "--seed", "1"], capsys).split("-" * 40 + "\n")
    assert len(parts) == 4 and parts[3] == "" and all(part.startswith("the ") for part in parts[:3])
    assert len(texts([str(finished), "--tokens", "40"], capsys)) == 41  # without a prompt, beyond the context of 16


def test_a_sample_is_of_the_models_distribution(finished):
    """Greedy text is the argmax of the logits at every position."""
    model, tokenizer = sample.load(finished)
    options = sample.Options(finished, prompt="the c", tokens=8, temperature=0.0)
    (text,) = sample.run(options)
    tokens = torch.tensor(tokenizer.encode(text))[None]
    assert tokens.shape == (1, 13)
    assert model.eval()(tokens)[0, 4:-1].argmax(dim=-1).tolist() == tokens[0, 5:].tolist()


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    """A Hugging Face GPT-2 checkpoint with random weights, and a tokenizer of its own."""
    sys.modules.setdefault("kernels", None)  # transformers looks for PyPI's package of that name
    transformers = pytest.importorskip("transformers")
    package = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("gpt2")
    words = {word: i for i, word in enumerate(("<|endoftext|>", "[UNK]", "the", "cat", "sat", ".", "mat", "on"))}
    tokenizer = package.Tokenizer(package.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = package.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = transformers.GPT2Config(
        vocab_size=8, n_positions=12, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_a_gpt2_checkpoint_writes(gpt2_folder, capsys):
    printed = texts([str(gpt2_folder), "--prompt", "the cat", "--tokens", "8", "--seed", "3"], capsys)
    assert printed.startswith("the cat") and "<|endoftext|>" not in printed


def test_a_gpt2_checkpoint_is_trained_on(gpt2_folder, text_file, tmp_path, capsys):
    out = tmp_path / "tuned"
    argv = ["--data", str(text_file), "--out", str(out), "--init-from", str(gpt2_folder), "--steps", "4"]
    assert train_gpt.main([*argv, "--log-every", "1", "--lr", "1e-12", "--min-lr", "0"]) == 0
    ours, theirs = sample.load(out)[0], sample.load(gpt2_folder)[0]
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)
    options = json.loads((out / "config.json").read_text())["options"]
    assert (options["width"], options["norm"], options["context"]) == (8, "pre", 12)
    assert options["tokenizer"] == f"{gpt2_folder}/tokenizer.json" and "held-out tokens" in capsys.readouterr().out
    assert train_gpt.main(["--out", str(out), "--resume"]) == 0
    assert train_gpt.main([*argv, "--overwrite", "--width", "16"]) == 2
    assert "--width must be the checkpoint's 8; got 16" in capsys.readouterr().err


# Wrong calls


CALLS = {
    "no such file": (["--data", "nowhere.txt"], "nowhere.txt: no such file or folder"),
    "an empty file": (["--data", "empty.txt"], "empty.txt: empty: the file has 0 bytes"),
    "not UTF-8": (["--data", "latin.txt"], "latin.txt: not UTF-8: invalid"),
    "too short": (
        ["--context", "400"],
        "words.txt: the text is too short: the part to validate on must have",
    ),
    "tokenizer": (["--tokenizer", "words"], "the tokenizer must be bytes, characters or a .json file; got 'words'"),
    "tokenizer file": (["--tokenizer", "no.json"], "no.json: no such file, so there is no tokenizer to read"),
    "preset": (["--preset", "gpt9"], "--preset must be one of primer, nanogpt-cpu, gpt2; got 'gpt9'"),
    "checkpoint": (["--init-from", "nowhere"], "nowhere"),
    "heads": (["--heads", "3"], "Transformer: heads must divide width; got 3 and 16"),
    "rate": (["--lr", "0"], "language_model: lr must be positive and finite; got 0.0"),
    "sample": (["--sample-tokens", "-1"], "--sample-tokens must not be negative; got -1"),
}


@pytest.mark.parametrize("call", CALLS)
def test_wrong_call(call, short, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "latin.txt").write_bytes("Grüße ".encode("latin-1") * 100)
    argv, message = CALLS[call]
    assert train_gpt.main([*short, *argv]) == 2
    captured = capsys.readouterr()
    assert message in words_of(captured.err + captured.out).replace(f"{tmp_path}/", "")
    assert not (tmp_path / "run").exists()


SAMPLES = {
    "no run": (["nowhere"], "nowhere: no such folder"),
    "another folder": (["."], "not the folder of a run of `primer-fast train gpt`: it has no transformer.json"),
    "characters": (["run", "--prompt", "X5"], "--prompt: CharacterTokenizer: the text must be made of the"),
    "long": (["run", "--prompt", "the " * 5], "--prompt must fit the model's context of 16 tokens; got 20"),
    "tokens": (["run", "--tokens", "0"], "--tokens must be positive; got 0"),
    "temperature": (["run", "--temperature", "-1"], "temperature must be 0 or more"),
    "top-p": (["run", "--top-p", "2"], "top_p must be in (0, 1]"),
}


@pytest.mark.parametrize("call", SAMPLES)
def test_wrong_call_of_sample(call, finished, monkeypatch, capsys):
    monkeypatch.chdir(finished.parent)
    argv, message = SAMPLES[call]
    assert main(["sample", *argv]) == 2
    assert message in words_of(capsys.readouterr().err)


def test_damaged_files_of_a_run_are_named(finished, capsys):
    def fails(message):
        assert main(["sample", str(finished)]) == 2
        assert message in words_of(capsys.readouterr().err)

    (finished / "tokenizer.json").write_text("{")
    fails(f"{finished / 'tokenizer.json'}: not JSON")
    weights = (finished / "model.safetensors").read_bytes()
    (finished / "model.safetensors").write_bytes(weights[:-9])
    fails(f"{finished / 'model.safetensors'}: not a safetensors file, or a truncated")
    safetensors.torch.save_file({"a": torch.zeros(1)}, finished / "model.safetensors")
    fails(f"{finished / 'model.safetensors'}: not the weights of the transformer in transformer.json")
    (finished / "transformer.json").write_text('{"width": 3}')
    fails(f"{finished / 'transformer.json'}: not the shape of a transformer")
    (finished / "model.safetensors").unlink()
    (finished / "checkpoint.safetensors").unlink()
    (finished / "transformer.json").write_text(json.dumps({"vocab": 5, "width": 4, "heads": 1}))
    fails("no weights yet: the run has neither model.safetensors nor checkpoint.safetensors")


# Pictures


def test_every_token_can_be_seen():
    assert [gpt_plots.visible(t) for t in ("a", " ", "\n", " cat", "\x00", "")] == ["a", "␣", "⏎", "␣cat", "�", "∅"]
    assert gpt_plots.visible("é世") == "é�"  # the font has no Chinese


def test_a_token_of_dollars_is_no_formula(tmp_path):
    names = ["$\\frac$", "$", "a"]  # as a formula the first would be an error
    gpt_plots.embeddings(tmp_path / "e.png", np.eye(3), names, "token")
    gpt_plots.attention(tmp_path / "a.png", [np.eye(3)[None]], names, "heads")
    assert (tmp_path / "e.png").exists() and (tmp_path / "a.png").exists()


def test_the_principal_plane_is_where_the_variance_is():
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.normal(size=(6, 6)))[0][:2]
    points = rng.normal(size=(50, 2)) * (5, 2)
    flat, share = gpt_plots.principal_plane(points @ directions + 3 + 1e-6 * rng.normal(size=(50, 6)))
    centred = points - points.mean(axis=0)
    np.testing.assert_allclose(np.abs(flat @ flat.T), np.abs(centred @ centred.T), atol=1e-3)
    assert share.sum() == pytest.approx(1) and share[0] > 0.8
    assert gpt_plots.principal_plane(np.ones((1, 3)))[0].tolist() == [[0, 0]]


def test_the_attention_drawn_is_that_of_the_model(short, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(gpt_plots, "attention", lambda path, weights, names, title: drawn.update(w=weights, n=names))
    assert train_gpt.main(short) == 0
    assert len(drawn["w"]) == 2 and drawn["w"][0].shape == (2, 16, 16) and len(drawn["n"]) == 16
    model, tokenizer = sample.load(tmp_path / "run")
    sentence = "".join(drawn["n"]).replace("␣", " ").replace("⏎", "\n")
    want = model.eval().attention_weights(torch.tensor([tokenizer.encode(sentence)]))
    for a, b in zip(drawn["w"], want, strict=True):
        np.testing.assert_allclose(a, b[0].numpy(), atol=1e-6)
