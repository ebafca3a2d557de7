"""Models with more ids than their tokenizer has tokens, and with fewer: what is drawn, and what is refused."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from cli.commands import gpt2, metrics

from primer_fast.cli import main, sample
from primer_fast.cli.run.folder import RunFolder
from primer_fast.cli.train import gpt_plots
from primer_fast.data import tokenizers
from primer_fast.data.tokenizers import CharacterTokenizer
from primer_fast.models.transformer import Transformer, TransformerConfig

pytestmark = pytest.mark.usefixtures("folder", "undrawn")
LETTERS = "\nabcdefghijklmnopqrstuvwxyz"


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


TRAIN = "--steps 2 --batch-size 8 --log-every 1 --out run"
GPT = "--steps 2 --batch-size 4 --eval-every 1 --eval-batches 1 --sample-tokens 30 --log-every 1 --out run"
CALLS = {
    "sample": "sample mine --tokens 40 --count 3 --seed 0",
    "sample of GPT-2": "sample hf --tokens 40 --temperature 2 --seed 0",
    "sft": f"train sft --model mine --data pairs.jsonl {TRAIN}",
    "ppo": f"train ppo --model mine --prompts prompts.txt --reward rewards:length --max-new-tokens 6 {TRAIN}",
    "gpt": f"train gpt --init-from hf --data words.txt {GPT}",
}


@pytest.mark.parametrize("call", CALLS)
def test_ids_without_a_token_are_never_drawn(call, folder, monkeypatch, capsys):
    run_of("mine", 64, CharacterTokenizer(LETTERS))
    gpt2(Path("hf"), 300)
    drawn = []
    decode = CharacterTokenizer.decode
    monkeypatch.setattr(
        CharacterTokenizer, "decode", lambda self, ids: decode(self, [drawn.append(i) or i for i in ids])
    )
    assert main(CALLS[call].split()) == 0, capsys.readouterr().err
    if "mine" in CALLS[call]:
        assert len(set(drawn)) > 5 and max(drawn) < 27
    if "run" in CALLS[call]:
        assert (folder / "run" / "sample.txt").exists()
        assert main(["sample", "run", "--tokens", "20", "--seed", "0"]) == 0
        rows = metrics("run")
        assert len(rows) == 2 and all(math.isfinite(value) for row in rows for value in row.values())
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
    argv = f"train gpt --data words.txt --tokenizer gaps.json --width 16 --layers 1 --heads 2 --context 8 {GPT}"
    assert main(argv.split()) == 0, capsys.readouterr().err
    assert sorted(shown) == ["?", "cat", "mat", "on"]
    model, tokenizer = sample.load(folder / "run")
    gaps = sorted(set(range(81)) - {0, 9, 60, 80})
    assert tokenizers.without_token(tokenizer, 81).tolist() == gaps
    logits = model(torch.tensor([[0, 9, 60, 80]]))
    assert logits[..., gaps].isneginf().all() and logits[..., [0, 9, 60, 80]].isfinite().all()


def test_a_tokenizer_without_line_ends(folder, capsys, refused):
    """It has no token that could end a text."""
    run_of("mine", 27, CharacterTokenizer(LETTERS[1:]))
    assert main(["sample", "base", "--tokens", "5", "--seed", "0"]) == 0
    assert len(capsys.readouterr().out.strip()) == 5
    message = "--line: the model's tokenizer has no token for the end of a line"
    assert message in refused("sample mine --line")
    assert "must know a token that ends a text, or the line end" in refused(CALLS["sft"])


def test_a_tokenizer_larger_than_the_model_is_refused_before_any_work(folder, monkeypatch, refused):
    run_of("small", 20, CharacterTokenizer(LETTERS))
    gpt2(Path("hf"), 200)
    monkeypatch.setattr("primer_fast.cli.train.gpt.tokenize", None)  # which is a minute of work on a large text
    for name in ("sft", "ppo"):
        message = refused(CALLS[name].replace("mine", "small"))
        assert f"{name}: small/tokenizer.json: must have at most the model's 20 tokens; got 27" in message
    assert "small/tokenizer.json: must have at most the model's 20 tokens; got 27" in refused("sample small")
    assert "hf/tokenizer.json: must have at most the model's 200 tokens; got 256" in refused("sample hf")
    assert "--tokenizer: must have at most the model's 200 tokens; got 256" in refused(CALLS["gpt"])
    assert not (folder / "run").exists()


def test_a_run_whose_tokenizer_was_replaced_by_a_larger_one_does_not_go_on(folder, monkeypatch, capsys, refused):
    argv = f"train gpt --data words.txt --width 16 --layers 1 --heads 2 --context 8 {GPT}"
    assert main(argv.split()) == 0
    capsys.readouterr()
    (folder / "run" / "tokenizer.json").write_text(CharacterTokenizer(LETTERS + " ").to_json())
    monkeypatch.setattr("primer_fast.cli.train.gpt.tokenize", None)
    message = refused("train gpt --out run --resume")
    assert "run/tokenizer.json: must have at most the model's 15 tokens; got 28" in message


def test_a_reward_model_smaller_than_its_tokenizer_is_refused(folder, refused):
    run_of("mine", 64, CharacterTokenizer(LETTERS))
    run_of("small", 20, CharacterTokenizer(LETTERS))
    message = refused(CALLS["ppo"].replace("rewards:length", "small"))
    assert "small: must have at most the model's 20 tokens; got 27" in message
