"""Numbers of any size and texts of any kind: a call ends with one line, whatever raised the error."""

import json

import pytest
import torch

from primer_fast.cli import main, sample
from primer_fast.cli.errors import SizeError, one_line, sizes_that_fit

LARGE = ("100000000000", "1" + "0" * 30, "1" + "0" * 400)
FACTS = {  # what is asked for -> what is raised
    "memory": lambda: torch.empty(1, 10**13, dtype=torch.int64),
    "product": lambda: torch.empty(2**40, 2**40),
    "integer": lambda: torch.empty(10**30),
    "seed": lambda: torch.Generator().manual_seed(2**70),
    "list": lambda: [0] * 10**14,
    "float": lambda: float(10**400),
    "GPU": lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate 9 GiB")),
}


@pytest.mark.parametrize("what", FACTS)
def test_a_size_that_nothing_holds_is_an_error_of_one_line(what):
    with pytest.raises(SizeError) as found, sizes_that_fit():
        next(iter(FACTS[what]()))
    message = str(found.value)
    assert message.startswith("a size is too large for this machine: ") and "\n" not in message
    assert "enforce fail" not in message and len(message) < 250


@pytest.mark.parametrize("error", [ValueError("a\nb"), RuntimeError("boom"), TypeError("x"), KeyError("k")], ids=repr)
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)) as found, sizes_that_fit():
        raise error
    assert found.value is error
    assert one_line(ValueError("a\n   b\n\nc  d\udcff")) == "a b c  d\\udcff"


GPT = "train gpt --data words.txt --layers 1 --heads 2 --context 8 --steps 1 --sample-tokens 0 --overwrite --out o"
PPO = (
    "train ppo --prompts prompts.txt --model base --reward rewards:length --max-new-tokens 4 --steps 1 --overwrite"
    " --out o"
)
SIZES = [
    ("sample base --tokens", LARGE), ("sample base --tokens 3 --count", LARGE), ("sample base --seed", LARGE[1:]),
    (f"{GPT} --width", LARGE), (f"{GPT} --width 16 --batch-size", LARGE), (f"{GPT} --width 16 --seed", LARGE[1:]),
    (f"{PPO} --batch-size", LARGE),
    ("train sft --data pairs.jsonl --model base --steps 1 --out o --seed", LARGE[1:]),
]  # fmt: skip


@pytest.mark.parametrize(("call", "sizes"), SIZES, ids=lambda x: x if isinstance(x, str) else "")
def test_numbers_that_are_too_large(call, sizes, folder, refused):
    for size in sizes:
        message = refused([*call.split(), size])
        assert "too large for this machine" in message or "need about" in message or "2^63" in message, message


@pytest.mark.parametrize("name", ["mlp --data soccer --epochs 1", "reward --data pairs.jsonl --model base --steps 1"])
def test_a_batch_may_be_larger_than_the_data(name, folder, undrawn):
    for size in LARGE:
        assert main(["train", *name.split(), "--batch-size", size, "--out", "o", "--overwrite"]) == 0


def test_the_memory_that_texts_need(folder, monkeypatch, refused):
    monkeypatch.setattr(sample, "memory", lambda: 2**20)
    message = refused(["sample", "base", "--tokens", "100000"])
    assert message.endswith("--tokens 100000 and --count 1 need about 0.0 GiB of memory; this machine has 0.0\n")
    assert main(["sample", "base", "--tokens", "1000"]) == 0
    monkeypatch.setattr(sample, "memory", lambda: None)  # where the system does not say
    assert main(["sample", "base", "--tokens", "10"]) == 0


@pytest.mark.parametrize(
    "call",
    ["sample base --prompt", "train gpt --out o --data", "train gpt --data words.txt --out o --tokenizer", "sample"],
)
def test_what_is_not_utf8_on_a_command_line(call, folder, refused):
    refused([*call.split(), "a\udcff"])


@pytest.mark.parametrize(
    ("field", "value"),
    [("norm_eps", "x"), ("norm_eps", None), ("norm_eps", -1), ("norm_eps", 10**400), ("tied", "false"), ("bias", 1),
     ("dropout", True), ("causal", None)],
)  # fmt: skip
def test_a_shape_of_the_wrong_types(field, value, folder, tmp_path, refused):
    shape = json.loads((folder / "base" / "transformer.json").read_text())
    (tmp_path / "transformer.json").write_text(json.dumps(shape | {field: value}))
    message = refused(["sample", str(tmp_path)])
    assert "transformer.json: not the shape of a transformer" in message and field in message
