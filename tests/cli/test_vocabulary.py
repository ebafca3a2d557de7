"""Models with more ids than their tokenizer has tokens, and with fewer: what is drawn, and what is refused."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch

from primer_fast.cli import gpt_plots, main, preference_plots, sample
from primer_fast.cli.run_folder import RunFolder
from primer_fast.data import tokenizers
from primer_fast.data.tokenizers import ByteTokenizer, CharacterTokenizer
from primer_fast.models.transformer import Transformer, TransformerConfig

pytestmark = pytest.mark.usefixtures("plain_path")
LETTERS = "\nabcdefghijklmnopqrstuvwxyz"
REWARDS = "def length(prompts, completions):\n    return [len(c) for c in completions]\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with data; no pictures are drawn in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "rewards_of_test", raising=False)
    for module, names in (
        (gpt_plots, ("curves", "attention", "positions", "embeddings")),
        (preference_plots, ("curves",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, lambda *_: None)
    rows = [{"prompt": "", "completion": word} for word in ("good", "fine", "nice", "great") * 3]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "prompts.txt").write_text("go\na\n")
    (tmp_path / "rewards_of_test.py").write_text(REWARDS)
    (tmp_path / "text.txt").write_text("the cat sat on the mat\n" * 30)
    return tmp_path


def run_of(name, vocab, tokenizer):
    """A finished run whose ids from 27 on would be drawn nearly always."""
    torch.manual_seed(0)
    config = TransformerConfig(vocab, context=12, width=16, layers=1, heads=2, norm="pre", positions="learned")
    run = RunFolder(name, "train gpt")
    run.begin({}, overwrite=False)
    run.write_files({
        "transformer.json": json.dumps(dataclasses.asdict(config)), "tokenizer.json": tokenizer.to_json()
    })  # fmt: skip
    model = Transformer(config)
    with torch.no_grad():
        model.norm.bias.fill_(1.0)
        model.embedding.weight[27:] += 3.0
    run.save_weights(model.state_dict())


def gpt2(name, vocab):
    """A Hugging Face GPT-2 checkpoint of random weights, with bytes for tokens."""
    torch.manual_seed(0)
    width = 16
    shape = {"vocab_size": vocab, "n_positions": 12, "n_embd": width, "n_layer": 1, "n_head": 2}
    model = {"wte.weight": torch.randn(vocab, width), "wpe.weight": torch.randn(12, width)}
    model |= {"ln_f.weight": torch.ones(width), "ln_f.bias": torch.ones(width)}
    model["wte.weight"][256:] += 3.0
    matrices = {"attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width)}
    matrices |= {"mlp.c_fc": (width, 4 * width), "mlp.c_proj": (4 * width, width)}
    for part, size in ({"ln_1": (width,), "ln_2": (width,)} | matrices).items():
        model |= {f"h.0.{part}.weight": torch.randn(size) * 0.1, f"h.0.{part}.bias": torch.zeros(size[-1])}
    folder = Path(name)
    folder.mkdir()
    safetensors.torch.save_file(model, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(shape | {"model_type": "gpt2"}))
    (folder / "tokenizer.json").write_text(ByteTokenizer().to_json())


TRAIN = "--steps 2 --batch-size 8 --log-every 1 --out run"
GPT = "--steps 2 --batch-size 4 --eval-every 1 --eval-batches 1 --sample-tokens 30 --log-every 1 --out run"
CALLS = {
    "sample": "sample base --tokens 40 --count 3 --seed 0",
    "sample of GPT-2": "sample hf --tokens 40 --temperature 2 --seed 0",
    "sft": f"train sft --model base --data words.jsonl {TRAIN}",
    "ppo": f"train ppo --model base --prompts prompts.txt --reward rewards_of_test:length --max-new-tokens 6 {TRAIN}",
    "gpt": f"train gpt --init-from hf --data text.txt {GPT}",
}


@pytest.mark.parametrize("call", CALLS)
def test_ids_without_a_token_are_never_drawn(call, folder, monkeypatch, capsys):
    run_of("base", 64, CharacterTokenizer(LETTERS))
    gpt2("hf", 300)
    drawn = []
    decode = CharacterTokenizer.decode
    monkeypatch.setattr(
        CharacterTokenizer, "decode", lambda self, ids: decode(self, [drawn.append(i) or i for i in ids])
    )
    assert main(CALLS[call].split()) == 0, capsys.readouterr().err
    if "base" in CALLS[call]:
        assert len(set(drawn)) > 5 and max(drawn) < 27
    if "run" in CALLS[call]:
        assert (folder / "run" / "sample.txt").exists()
        assert main(["sample", "run", "--tokens", "20", "--seed", "0"]) == 0
        metrics = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        assert len(metrics) == 2 and all(math.isfinite(value) for row in metrics for value in row.values())
        (folder / "run" / "model.safetensors").unlink()
        assert main([*CALLS[call].split()[:2], "--out", "run", "--resume"]) == 0


def test_tokens_with_gaps_between_their_ids(folder, monkeypatch, capsys):
    """A model that is trained on them draws none of the ids between, and the picture of the tokens shows none."""
    shown = []
    monkeypatch.setattr(gpt_plots, "embeddings", lambda path, rows, names, unit: shown.extend(names))
    package = pytest.importorskip("tokenizers")
    words = package.Tokenizer(package.models.WordLevel({"cat": 0, "mat": 9, "on": 60, "?": 80}, unk_token="?"))
    words.pre_tokenizer = package.pre_tokenizers.Whitespace()
    words.save("gaps.json")
    argv = f"train gpt --data text.txt --tokenizer gaps.json --width 16 --layers 1 --heads 2 --context 8 {GPT}"
    assert main(argv.split()) == 0, capsys.readouterr().err
    assert sorted(shown) == ["?", "cat", "mat", "on"]
    model, tokenizer = sample.load(folder / "run")
    gaps = sorted(set(range(81)) - {0, 9, 60, 80})
    assert tokenizers.without_token(tokenizer, 81).tolist() == gaps
    logits = model(torch.tensor([[0, 9, 60, 80]]))
    assert logits[..., gaps].isneginf().all() and logits[..., [0, 9, 60, 80]].isfinite().all()


def test_a_tokenizer_without_line_ends(folder, capsys, refused):
    """It has no token that could end a text."""
    run_of("base", 27, CharacterTokenizer(LETTERS[1:]))
    assert main(["sample", "base", "--tokens", "5", "--seed", "0"]) == 0
    assert len(capsys.readouterr().out.strip()) == 5
    message = "--line: the model's tokenizer has no token for the end of a line"
    assert message in refused("sample base --line")
    assert "must know a token that ends a text, or the line end" in refused(CALLS["sft"])


def test_a_tokenizer_larger_than_the_model_is_refused_before_any_work(folder, monkeypatch, refused):
    run_of("small", 20, CharacterTokenizer(LETTERS))
    gpt2("hf", 200)
    monkeypatch.setattr("primer_fast.cli.train_gpt.tokenize", None)  # which is a minute of work on a large text
    for name in ("sft", "ppo"):
        message = refused(CALLS[name].replace("base", "small"))
        assert f"{name}: small/tokenizer.json: must have at most the model's 20 tokens; got 27" in message
    assert "small/tokenizer.json: must have at most the model's 20 tokens; got 27" in refused("sample small")
    assert "hf/tokenizer.json: must have at most the model's 200 tokens; got 256" in refused("sample hf")
    assert "--tokenizer: must have at most the model's 200 tokens; got 256" in refused(CALLS["gpt"])
    assert not (folder / "run").exists()


def test_a_run_whose_tokenizer_was_replaced_by_a_larger_one_does_not_go_on(folder, monkeypatch, capsys, refused):
    argv = f"train gpt --data text.txt --width 16 --layers 1 --heads 2 --context 8 {GPT}"
    assert main(argv.split()) == 0
    capsys.readouterr()
    (folder / "run" / "tokenizer.json").write_text(CharacterTokenizer(LETTERS + " ").to_json())
    monkeypatch.setattr("primer_fast.cli.train_gpt.tokenize", None)
    message = refused("train gpt --out run --resume")
    assert "run/tokenizer.json: must have at most the model's 11 tokens; got 28" in message


def test_a_reward_model_smaller_than_its_tokenizer_is_refused(folder, refused):
    run_of("base", 64, CharacterTokenizer(LETTERS))
    run_of("small", 20, CharacterTokenizer(LETTERS))
    message = refused(CALLS["ppo"].replace("rewards_of_test:length", "small"))
    assert "small: must have at most the model's 20 tokens; got 27" in message
