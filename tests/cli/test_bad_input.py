"""Files that are not what a command takes them for: it ends with one line that names the file, and the line in it."""

import json
import os
import shutil
from pathlib import Path

import pytest
from cli.commands import gpt2, whole

PAIR = b'{"prompt": "", "chosen": "a", "rejected": "b"}\n'
FILES = {  # name -> content, what is said of it
    "latin.txt": (b"caf\xe9 " * 50, "latin.txt: not UTF-8: invalid continuation byte at byte 3"),
    "short.txt": (b"\xef\xbb\xbfab\r\n" * 2, "short.txt: the text is too short"),
    "latin.jsonl": (PAIR + b'{"prompt": "caf\xe9"}\n', "latin.jsonl: must be UTF-8 text; byte 62 is not"),
    "torn.jsonl": (PAIR + PAIR[:20], "torn.jsonl, line 2: must be a JSON object; Unterminated string"),
    "deep.jsonl": (b"[" * 100_000, "deep.jsonl, line 1: must be a JSON object; maximum recursion depth"),
    "half.jsonl": (PAIR + PAIR.replace(b'"a"', b'"\\ud800"'), "half.jsonl, line 2: must hold whole characters; got "),
    "few.jsonl": (PAIR, "few.jsonl: split_pairs: both parts need a pair; got 1 pairs"),
    "torn.tsv": (b"mean_rating\ttext\n1.0\n", "torn.tsv, line 2: must have 2 columns; got 1"),
    "long.tsv": (b"mean_rating\ttext\n1.0\t" + b"a" * 200_000, "long.tsv: "),
    "a folder": (None, "a folder: "),
    "none.jsonl": (None, "none.jsonl: no such file"),
}
CALLS = {  # suffix -> commands that read such a file
    "txt": ("train gpt --out o --data",),
    "jsonl": (
        "train dpo --model base --out o --data",
        "train reward --model base --out o --data",
        "align --out o --preferences",
    ),
    "tsv": ("train dpo --model base --out o --data", "align --out o --ratings"),
}

PPO = "train ppo --prompts prompts.txt --model base --max-new-tokens 4 --out o --reward"


def of(name):
    """The content of a file beside the run."""
    return lambda run: (run.parent / name).read_bytes()


def damaged(name, content):
    """A model whose file ``name`` holds something else; None: a folder stands in its place."""

    def damage(model):
        (model / name).unlink()
        if content is None:
            (model / name).mkdir()
        else:
            (model / name).write_bytes(content(model) if callable(content) else content)

    return damage


MODELS = {
    "weights cut": (lambda m: os.truncate(m / "model.safetensors", 5000), "model/model.safetensors: not a safetensors"),
    "no weights": (
        damaged("model.safetensors", b""),
        "model/model.safetensors: not a safetensors file, or a truncated",
    ),
    "a folder of weights": (damaged("model.safetensors", None), "model/model.safetensors: cannot be read ("),
    "deep shape": (
        damaged("transformer.json", b"[" * 100_000),
        "model/transformer.json: not the shape of a transformer",
    ),
    "deep tokenizer": (damaged("tokenizer.json", b"[" * 100_000), "model/tokenizer.json: not JSON"),
    "shape": (damaged("transformer.json", b"{"), "model/transformer.json: not the shape of a transformer, or damaged"),
    "binary shape": (damaged("transformer.json", b"\xff"), "model/transformer.json: not the shape of a transformer"),
    "other shape": (
        damaged("transformer.json", lambda m: (m / "../base/transformer.json").read_bytes().replace(b"16", b"32", 1)),
        "model/model.safetensors: not the weights of the transformer in transformer.json (size mismatch for ",
    ),
    "tokenizer": (damaged("tokenizer.json", b"\xff\xfe"), "model/tokenizer.json: 'utf-8' codec can't decode byte 0xff"),
    "other tokenizer": (
        damaged("tokenizer.json", b'{"primer_fast": "bytes"}'),
        "model/tokenizer.json: must have at most the model's 28 tokens; got 256",
    ),
}


def with_option(**changes):
    def content(run):
        config = json.loads((run / "../whole-gpt/config.json").read_text())
        config["options"] |= changes
        return json.dumps(config).encode()

    return content


RUNS = {  # what is wrong with a run that is to go on -> file, its content, what is said
    "list": ("config.json", b"[]", "run/config.json: not the configuration of a run, or damaged"),
    "text": (
        "config.json",
        with_option(context="abc"),
        "run/config.json: not the configuration of this command (context must be int; got 'abc')",
    ),
    "none": ("config.json", with_option(width=None), "(width must be int; got None)"),
    "number": ("config.json", with_option(data=3), "(data must be str; got 3)"),
    "float": ("config.json", with_option(layers=1.5), "(layers must be int; got 1.5)"),
    "choice": (
        "config.json",
        with_option(preset="zzz"),
        "(preset must be Literal['primer', 'nanogpt-cpu', 'gpt2']; got 'zzz')",
    ),
    "train": ("config.json", with_option(train={"lr": "x"}), "(lr must be float; got 'x')"),
    "no train": ("config.json", with_option(train=3), "(train must be LanguageModelConfig; got 3)"),
    "nan": ("config.json", with_option(train={"lr": float("nan")}), "lr must be positive and finite; got nan"),
    "unknown": ("config.json", with_option(foo=1), "unexpected keyword argument 'foo'"),
    "cut": (
        "checkpoint.safetensors",
        lambda run: of("whole-gpt/checkpoint.safetensors")(run)[:-4],
        "run/checkpoint.safetensors: not a safetensors",
    ),
    "other": (
        "checkpoint.safetensors",
        of("base/checkpoint.safetensors"),
        "run/checkpoint.safetensors: made from another model: its embedding.weight is (28, 16)",
    ),
    "weights": (
        "checkpoint.safetensors",
        of("whole-gpt/model.safetensors"),
        "run/checkpoint.safetensors: not a checkpoint of this version",
    ),
    "folder": ("checkpoint.safetensors", None, "run/checkpoint.safetensors: cannot be read ("),
    "tokenizer": ("tokenizer.json", b"\xff", "run/tokenizer.json: 'utf-8' codec"),
    "shape": ("transformer.json", b"nope", "run/transformer.json: not the shape of a transformer, or damaged"),
}
REWARDS = {
    "raise RuntimeError('boom')": "importing it raised RuntimeError: boom",
    "def f(:": "importing it raised SyntaxError: ",
    "raise SystemExit(3)": "importing it raised SystemExit: 3",
    "f = 3": "must be a function; got int",
    "": "has no attribute 'f'",
}


@pytest.fixture
def data(folder):
    """The current folder, with FILES in it."""
    for name, (content, _) in FILES.items():
        if content is not None:
            Path(name).write_bytes(content)
    Path("a folder").mkdir()
    return folder


def calls_on(name):
    suffix = name.rpartition(".")[2]
    if name == "a folder":
        return [*CALLS["jsonl"], *CALLS["txt"], CALLS["tsv"][1]]
    return CALLS[suffix]


@pytest.mark.parametrize("name", FILES)
def test_data(name, data, refused):
    for call in calls_on(name):
        assert FILES[name][1] in refused([*call.split(), name]), call
        assert not Path("o").exists(), "nothing is begun with what cannot be read"


@pytest.mark.parametrize("name", ["latin.jsonl", "torn.jsonl", "deep.jsonl", "half.jsonl", "a folder", "none.jsonl"])
def test_completions_and_prompts(name, data, refused):
    ppo = "train ppo --model base --reward rewards:length --max-new-tokens 4 --out o --prompts"
    for call in ("train sft --model base --out o --data", ppo):
        assert FILES[name][1] in refused([*call.split(), name]), call


@pytest.mark.parametrize("name", MODELS)
def test_a_damaged_model(name, folder, refused):
    shutil.copytree("base", "model")
    damage, words = MODELS[name]
    damage(folder / "model")
    assert words in refused(["sample", "model"])
    assert words in refused(["train", "dpo", "--data", "pairs.jsonl", "--out", "o", "--model", "model"])


def test_a_configuration_of_gpt2_that_is_nested_without_end(folder, refused):
    gpt2(Path("hf"), 256)
    Path("hf/config.json").write_text('{"model_type": ' + "[" * 100_000)
    assert "config.json must be JSON" in refused("sample hf")


def test_another_model_is_no_reward_model(folder, refused):
    argv = [*PPO.split(), "base"]
    assert "base: not the weights of a reward model (Missing key(s) in state_dict: " in refused(argv)


@pytest.mark.parametrize("code", REWARDS)
def test_a_module_of_rewards(code, folder, monkeypatch, refused):
    monkeypatch.delitem(__import__("sys").modules, "broken_rewards", raising=False)
    (folder / "broken_rewards.py").write_text(code)
    __import__("importlib").invalidate_caches()
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    argv = [*PPO.split(), "broken_rewards:f"]
    message = refused(argv)
    assert "--reward broken_rewards:f: " in message and REWARDS[code] in message


@pytest.mark.parametrize("name", RUNS)
def test_a_damaged_run_does_not_go_on(name, folder, undrawn, refused):
    shutil.copytree(whole("gpt"), "run")
    file, content, words = RUNS[name]
    damaged(file, content)(folder / "run")
    assert words in refused(["train", "gpt", "--out", "run", "--resume"])


def test_a_part_of_the_path_is_a_file(folder, refused):
    message = refused(["train", "gpt", "--data", "words.txt", "--out", "words.txt/run"], status=1)
    assert "words.txt/run: cannot be written (Not a directory); a part of this path is a file" in message
