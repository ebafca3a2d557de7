"""Files that are not what a command takes them for: it ends with one line that names the file, and the line in it."""

import json
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


def of(name, end=None):
    """The content of a file beside the folder, or its beginning."""
    return lambda folder: (folder.parent / name).read_bytes()[:end]


def with_option(**changes):
    def content(folder):
        config = json.loads((folder / "../whole-gpt/config.json").read_text())
        config["options"] |= changes
        return json.dumps(config).encode()

    return content


def damage(folder, name, content):
    """A file of the folder holds something else; None: a folder stands in its place."""
    (folder / name).unlink()
    if content is None:
        (folder / name).mkdir()
    else:
        (folder / name).write_bytes(content(folder) if callable(content) else content)


NO_SHAPE, NO_WEIGHTS = "not the shape of a transformer, or damaged", "not a safetensors file, or a truncated"
MODELS = {  # what is wrong with a model -> file, its content, what is said of the file
    "weights cut": ("model.safetensors", of("base/model.safetensors", 5000), NO_WEIGHTS),
    "no weights": ("model.safetensors", b"", NO_WEIGHTS),
    "other weights": (
        "model.safetensors", of("whole-gpt/model.safetensors"),
        "not the weights of the transformer in transformer.json (size mismatch for ",
    ),
    "a folder of weights": ("model.safetensors", None, "cannot be read ("),
    "shape": ("transformer.json", b"{", NO_SHAPE),
    "deep shape": ("transformer.json", b"[" * 100_000, NO_SHAPE),
    "binary shape": ("transformer.json", b"\xff", NO_SHAPE),
    "tokenizer": ("tokenizer.json", b"\xff\xfe", "'utf-8' codec can't decode byte 0xff"),
    "deep tokenizer": ("tokenizer.json", b"[" * 100_000, "not JSON"),
    "other tokenizer": (
        "tokenizer.json", b'{"primer_fast": "bytes"}', "must have at most the model's 28 tokens; got 256"
    ),
}  # fmt: skip
RUNS = {  # the same of a run that is to go on
    "list": ("config.json", b"[]", "not the configuration of a run, or damaged"),
    "text": ("config.json", with_option(context="abc"), "of this command (context must be int; got 'abc')"),
    "none": ("config.json", with_option(width=None), "(width must be int; got None)"),
    "number": ("config.json", with_option(data=3), "(data must be str; got 3)"),
    "float": ("config.json", with_option(layers=1.5), "(layers must be int; got 1.5)"),
    "choice": ("config.json", with_option(preset="zzz"), "(preset must be Literal['primer', 'nanogpt-cpu', 'gpt2']; "),
    "train": ("config.json", with_option(train={"lr": "x"}), "(lr must be float; got 'x')"),
    "no train": ("config.json", with_option(train=3), "(train must be LanguageModelConfig; got 3)"),
    "nan": ("config.json", with_option(train={"lr": float("nan")}), "lr must be positive and finite; got nan"),
    "unknown": ("config.json", with_option(foo=1), "unexpected keyword argument 'foo'"),
    "cut": ("checkpoint.safetensors", of("whole-gpt/checkpoint.safetensors", -4), NO_WEIGHTS),
    "other": ("checkpoint.safetensors", of("base/checkpoint.safetensors"), "made from another model: its embedding."),
    "weights": ("checkpoint.safetensors", of("whole-gpt/model.safetensors"), "not a checkpoint of this version"),
    "folder": ("checkpoint.safetensors", None, "cannot be read ("),
    "tokenizer": ("tokenizer.json", b"\xff", "'utf-8' codec"),
    "shape": ("transformer.json", b"nope", NO_SHAPE),
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
def test_a_damaged_model(name, folder, undrawn, refused):
    whole("gpt")
    shutil.copytree("base", "model")
    file, content, words = MODELS[name]
    damage(folder / "model", file, content)
    for call in ("sample model", "train dpo --data pairs.jsonl --out o --model model"):
        message = refused(call)
        assert f"model/{file}: " in message and words in message


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
    damage(folder / "run", file, content)
    message = refused("train gpt --out run --resume")
    assert f"run/{file}: " in message and words in message


def test_a_part_of_the_path_is_a_file(folder, refused):
    message = refused(["train", "gpt", "--data", "words.txt", "--out", "words.txt/run"], status=1)
    assert "words.txt/run: cannot be written (Not a directory); a part of this path is a file" in message
