"""Every command that trains in a call that takes a second, and what such calls are made on."""

import contextlib
import io
import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import safetensors
import safetensors.torch
import torch

from primer_fast.cli import main, plots
from primer_fast.cli.run.folder import RunFolder
from primer_fast.cli.train import cnn_plots, gpt_plots, preference_plots
from primer_fast.data.preferences import RatedText
from primer_fast.data.tokenizers import ByteTokenizer

TIMES = ("seconds", "per_second")  # how metrics end that depend on the machine
SMALL = "--width 16 --layers 1 --heads 2"
DIGITS = "--data digits --batch-size 16 --epochs 3 --log-every 2 --warmup-steps 2"
TWELVE = "--steps 12 --batch-size 8 --log-every 2 --lr 0.003"
OF_DIGITS = ("curves.png", "confusion.png", "mistakes.png")
OF_A_MODEL = ("transformer.json", "tokenizer.json", "curves.png", "sample.txt")


@dataclass(frozen=True)
class Call:
    """A short run, with a row and a checkpoint on its way, in a folder that ``write_inputs`` filled."""

    words: str  # without --out
    result: str  # in the line that it ends with
    files: tuple[str, ...]  # that it leaves beside those of every run
    steps: int = 12

    @property
    def name(self):
        return " ".join(self.words.split()[:2])

    def argv(self, out, *more):
        return [*self.words.split(), "--out", str(out), *more]


CALLS = {
    "mlp": Call(
        "train mlp --data soccer --epochs 12 --log-every 2", "of 40 players classified right",
        ("curves.png", "confusion.png", "surface.png"),
    ),
    "cnn": Call(  # with kernels over several channels, which lie channels_last
        f"train cnn {DIGITS} --channels 4 6 --kernel-size 2 --pool 1 --hidden 8", "of 30 digits",
        (*OF_DIGITS, "kernels.png", "feature_maps.png", "max_pool.png"),
    ),
    "vit": Call(f"train vit {DIGITS} {SMALL} --patch 3 --dropout 0.1 --pool mean", "of 30 digits", OF_DIGITS),
    "gpt": Call(
        f"train gpt --data words.txt {SMALL} --context 16 --batch-size 4 --steps 12 --warmup-steps 2 --log-every 2"
        " --eval-every 4 --eval-batches 1 --sample-tokens 5 --dropout 0.1", "nats per character (312 held-out",
        (*OF_A_MODEL, "attention.png", "positions.png", "embeddings.png"),
    ),
    "sft": Call(f"train sft --data pairs.jsonl --model base {TWELVE}", "nats per character", OF_A_MODEL),
    "reward": Call(f"train reward --data pairs.jsonl --model base {TWELVE}", "right on", OF_A_MODEL),
    "dpo": Call(
        f"train dpo --data pairs.jsonl --model base {TWELVE}", "moved the right way on",
        (*OF_A_MODEL, "reference.safetensors"),
    ),
    "ppo": Call(
        "train ppo --prompts prompts.txt --model base --reward rewards:length --max-new-tokens 6 --steps 6"
        " --batch-size 8 --epochs 2 --minibatches 2 --log-every 1 --lr 0.003", "score", OF_A_MODEL, steps=6,
    ),
}  # fmt: skip
ALIGN = (
    f"align {SMALL} --pairs 60 --samples 40 --points 2 --point-samples 20 --betas 0.5 2"
    " --sft.steps 20 --sft.batch-size 16 --sft.log-every 2 --reward.steps 6 --reward.batch-size 16 --reward.log-every 1"
    " --ppo.steps 4 --ppo.batch-size 16 --dpo.steps 6 --dpo.batch-size 16 --dpo.lr 0.001"
)
LEXICON = [  # of words that are liked and words that are not
    RatedText(a + b + c, 2.0 if b in ("glad", "joy") else -2.0)
    for a in ("", "un")
    for b in ("glad", "joy", "sad", "woe")
    for c in ("", "ful", "less", "ly", "ness")
]
PICTURES = {  # what the calls above draw
    plots: ("curves", "confusion_matrix", "decision_surface", "mistakes"),
    cnn_plots: ("kernels", "feature_maps", "max_pool"),
    gpt_plots: ("curves", "attention", "positions", "embeddings"),
    preference_plots: ("curves",),
}


def without_pictures(replace=setattr):
    """They take seconds, and most tests are about something else."""
    for module, names in PICTURES.items():
        for name in names:
            replace(module, name, lambda *_, **__: None)


def write_inputs():
    """What the calls are made on, in the current folder, but for the model ``base``."""
    Path("words.txt").write_text("the cat sat on the mat, and the rat sat on the cat.\n" * 60)
    rows = [
        {"prompt": "", "chosen": a, "rejected": b} for a in ("good", "fine", "nice") for b in ("bad", "ugly", "sad")
    ]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("prompts.txt").write_text("go\na\n")
    Path("rewards.py").write_text(
        "def length(prompts, completions):\n"
        "    assert set(prompts) <= {'go', 'a'} and not any('\\n' in c for c in completions)\n"
        "    return [len(c) for c in completions]\n"
    )
    Path("letters.txt").write_text("abcdefghijklmnopqrstuvwxyz go\n" * 20)
    write_digits(Path("digits"))


def write_digits(folder):
    """Four IDX files: 60 images of 6 x 6 pixels to train on and 30 to test, whose class is a bright row or column."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for part, count in (("train", 60), ("t10k", 30)):
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        images = rng.integers(0, 60, (count, 6, 6), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            (image if label < 5 else image.T)[label % 5] = 250
        for kind, array in (("images", images), ("labels", labels)):
            header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            (folder / f"{part}-{kind}-idx{array.ndim}-ubyte").write_bytes(header + array.tobytes())


def make_base():
    """Train ``base``, the model that the procedures on completions begin with."""
    argv = f"train gpt --data letters.txt --out base {SMALL} --context 12 --batch-size 4 --steps 2 --sample-tokens 0"
    assert main(argv.split()) == 0


@contextlib.contextmanager
def base_in(folder):
    """Inside it ``folder`` is the current one, with all that the calls need. Nothing is printed or drawn."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.callback(os.chdir, os.getcwd())
        os.chdir(folder)
        stack.enter_context(mock.patch("primer_fast.backend.stand_in", None))
        without_pictures(lambda module, name, function: stack.enter_context(mock.patch.object(module, name, function)))
        write_inputs()
        make_base()
        yield


def whole(name):
    """The folder of a run of ``CALLS[name]`` that nothing disturbs; made once in the current folder."""
    out = Path(f"whole-{name}")
    if not (out / "model.safetensors").exists():
        assert main(CALLS[name].argv(out)) == 0
    return out


@contextlib.contextmanager
def at_step(step, do, folder=None):
    """Inside it a run calls ``do`` after its row of ``step``: any run, or the one in a folder of that name."""
    log = RunFolder.log

    def log_and_do(self, row):
        log(self, row)
        if row["step"] == step and folder in (None, self.path.name):
            do()

    with mock.patch.object(RunFolder, "log", log_and_do):
        yield


def spoil(step):
    """``torch.nn.utils.get_total_norm`` where a gradient of an optimizer step is NaN, as where a loss overflows."""
    norm, calls = torch.nn.utils.get_total_norm, []

    def spoilt(grads, *args, **kwargs):
        calls.append(1)
        if len(calls) == step:
            grads[0].fill_(float("nan"))
        return norm(grads, *args, **kwargs)

    return mock.patch.object(torch.nn.utils, "get_total_norm", spoilt)


def gpt2(folder, vocab, tokenizer=None):
    """A Hugging Face GPT-2 checkpoint of random weights, with bytes for tokens unless it has a tokenizer's JSON."""
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
    folder.mkdir()
    safetensors.torch.save_file(model, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(shape | {"model_type": "gpt2"}))
    (folder / "tokenizer.json").write_text(tokenizer or ByteTokenizer().to_json())


def metrics(folder, times=False):
    """The rows of a run, without what depends on the machine's speed unless ``times`` says so."""
    rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return rows if times else [{k: v for k, v in row.items() if not k.endswith(TIMES)} for row in rows]


def saved_step(folder):
    """The step of a run's checkpoint."""
    with safetensors.safe_open(Path(folder, "checkpoint.safetensors"), framework="pt") as file:
        return json.loads(file.metadata()["progress"])["step"]


def contents(folder):
    """All that a run has to show, without times; tensors as their dtype, shape and bytes."""
    found = {}
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                found[name] = file.metadata() or {}
            for key, t in tensors.items():
                data = t.contiguous().flatten().view(torch.uint8).numpy().tobytes()
                found[f"{name} {key}"] = t.dtype, t.shape, data
        elif path.name == "metrics.jsonl":
            found[name] = metrics(path.parent)
        elif path.suffix == ".html":  # names its folder
            found[name] = path.read_text().replace(f"{Path(folder).name}/", "OUT/")
        else:
            found[name] = path.read_bytes()
    return found


def differences(ours, theirs):
    """What is not in both of two folders of runs, or not the same bit for bit."""
    ours, theirs = contents(ours), contents(theirs)
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
