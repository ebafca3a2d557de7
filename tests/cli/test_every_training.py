"""What every command that trains is held to: what it leaves, resuming, its options, gradients that are not finite."""

import json
import os
import shutil
import signal
from pathlib import Path

import matplotlib.image
import pytest
import safetensors.torch
import torch
from cli.commands import CALLS, DIGITS, SMALL, at_step, differences, gpt2, metrics, saved_step, spoil, whole

from primer_fast.cli import main
from primer_fast.cli.run.folder import RunFolder

pytestmark = pytest.mark.usefixtures("folder")
NAMES = ("config.json", "metrics.jsonl", "checkpoint.safetensors", "model.safetensors")  # of every run
LEARN = "--data digits --epochs 60 --batch-size 16 --log-every 20 --augmentation none --lr 0.01 --warmup-steps 20"
LEARNT = {  # a longer call -> command, a metric of its last row, at least or at most what that must be
    f"train mlp {LEARN} --sizes 36 24 10": ("mlp", "test/accuracy", 1.0),
    f"train cnn {LEARN} --channels 8 --kernel-size 3 --hidden 16": ("cnn", "test/accuracy", 1.0),
    f"train vit {LEARN} {SMALL} --patch 3": ("vit", "test/accuracy", 0.95),
    f"{CALLS['gpt'].words} --steps 200 --lr 0.01 --warmup-steps 20 --log-every 50 --eval-every 100 --dropout 0"
    " --sample-tokens 20": ("gpt", "validation/loss", -0.5),
    "train mlp --data soccer --epochs 1500": ("soccer", "train/accuracy", 1.0),
} | {CALLS[name].words: (name, "step", CALLS[name].steps) for name in ("sft", "reward", "dpo", "ppo")}  # fmt: skip
SAID = {"mlp": "test accuracy 100.00% (30 of 30 digits)", "soccer": "40 of 40 players classified right (100.00%)"}
FILES = {"mlp": CALLS["vit"].files, "soccer": CALLS["mlp"].files}


@pytest.mark.parametrize("call", LEARNT, ids=lambda call: LEARNT[call][0])
def test_a_run_learns_and_leaves_its_files(call, capsys):
    name, metric, bound = LEARNT[call]
    assert main([*call.split(), "--out", "run"]) == 0
    last = metrics("run", times=True)[-1]
    assert last[metric] >= bound or (bound < 0 and last[metric] < -bound), last
    assert last["train/seconds"] > 0
    files = FILES.get(name) or CALLS[name].files
    assert {path.name for path in Path("run").iterdir()} == {*NAMES, *files}
    for file in Path("run").glob("*.png"):
        height, width, _ = matplotlib.image.imread(file).shape
        assert height > 80 and width > 300, file
    printed = " ".join(capsys.readouterr().out.split())
    assert all(file in printed for file in (*NAMES, *files) if file != "reference.safetensors")
    assert (SAID.get(name) or CALLS[name].result) in printed
    if "sample.txt" in files:
        assert Path("run/sample.txt").read_text().strip()
    saved, weights = (safetensors.torch.load_file(f"run/{file}") for file in NAMES[2:])
    prefix = "model.policy." if name == "ppo" else "model."
    assert all(torch.equal(t, saved[prefix + key]) for key, t in weights.items() if key not in ("mean", "std"))
    if name in ("sft", "reward", "dpo", "ppo"):
        base = safetensors.torch.load_file("base/model.safetensors")["embedding.weight"]
        assert not torch.equal(base, weights.get("embedding.weight", weights.get("trunk.embedding.weight")))


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("name", "step"), [*((name, CALLS[name].steps // 2) for name in CALLS), ("gpt", 8)])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(name, step, capsys):
    """By a signal, with a row that the checkpoint does not cover, and read by another command meanwhile."""
    by = signal.SIGINT if step == 8 else signal.SIGTERM
    want = whole(name)
    capsys.readouterr()
    with at_step(step, lambda: signal.raise_signal(by)):
        assert main(CALLS[name].argv("run")) == 128 + by
    printed = " ".join(capsys.readouterr().out.split())
    assert f"stopped at step {step} of {CALLS[name].steps} and saved in run" in printed
    assert f"go on with: primer-fast {' '.join(CALLS[name].argv('run'))} --resume" in printed
    assert saved_step("run") == metrics("run")[-1]["step"] == step and not Path("run/model.safetensors").exists()
    RunFolder("run", CALLS[name].name).log({"step": step + 1, "train/loss": 99.0})
    if name == "gpt":
        assert main(["sample", "run", "--tokens", "5"]) == 0
    assert main([*CALLS[name].name.split(), "--out", "run", "--resume"]) == 0
    assert differences("run", want) == []


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", CALLS)
def test_a_finished_run(name, capsys, refused):
    """It says its result again, without the options that it was begun before; no other run takes its place."""
    again = [*CALLS[name].name.split(), "--out", "run", "--resume"]
    shutil.copytree(whole(name), "run")
    message = refused([*again, "--lr", "9", "--seed", "7"])
    assert message.startswith(f"primer-fast {CALLS[name].name}: run: the run was begun with lr ")
    assert " (now 9.0), seed 0 (now 7); leave them out to go on" in message
    assert "exclude each other" in refused([*again, "--overwrite"])
    message = refused(CALLS[name].argv("run"))
    assert "run: holds a finished run; --resume goes on with it, --overwrite starts anew" in message
    other = "train mlp" if name != "mlp" else "train cnn"
    assert f"run: holds a run of `primer-fast {CALLS[name].name}`, not of" in refused(f"{other} --out run --resume")
    assert differences("run", whole(name)) == []

    config = json.loads(Path("run/config.json").read_text())
    for option in ("accumulate", "cuda_graphs", "precision"):
        config["options"]["train"].pop(option, None)
    Path("run/config.json").write_text(json.dumps(config))
    capsys.readouterr()
    rows = metrics("run", times=True)
    assert main([*CALLS[name].argv("run"), "--resume"]) == 0
    assert CALLS[name].result in " ".join(capsys.readouterr().out.split())
    assert metrics("run", times=True) == rows and differences("run", whole(name)) == ["config.json"]
    Path("run/checkpoint.safetensors").unlink()  # killed before its first checkpoint: it starts again
    Path("run/model.safetensors").unlink()
    assert main(again) == 0
    assert differences("run", whole(name)) == ["config.json"]
    assert main([*CALLS[name].argv("run"), "--overwrite"]) == 0
    assert differences("run", whole(name)) == []


FIRST_BAD = {"ppo": 2}  # of a rollout's two passes of two minibatches
PROCEDURES = {"mlp": "supervised", "cnn": "supervised", "vit": "supervised", "gpt": "language_model"}


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("name", "step"), [*((name, 5) for name in CALLS), ("mlp", 1)])
def test_a_gradient_that_is_not_finite(name, step, refused):
    """The run stops, says at which step, and keeps the last good checkpoint."""
    bad = FIRST_BAD.get(name, step)
    with spoil(step):
        message = refused(CALLS[name].argv("run"), status=1)
    assert message.startswith(f"primer-fast {CALLS[name].name}: {PROCEDURES.get(name, name)}: the ")
    assert f"not finite at {'rollout' if name == 'ppo' else 'step'} {bad};" in message
    rows = metrics("run") if step > 1 else []
    assert rows == [row for row in metrics(whole(name)) if row["step"] < bad]
    assert not Path("run/model.safetensors").exists()
    if rows:
        assert "the checkpoint in run is of an earlier step and kept" in message
        assert saved_step("run") == 4 if name != "ppo" else 1
        tensors = safetensors.torch.load_file("run/checkpoint.safetensors")
        assert all(t.isfinite().all() for t in tensors.values())
    else:
        assert "no checkpoint had been written yet" in message and not Path("run/checkpoint.safetensors").exists()
    assert main([*CALLS[name].name.split(), "--out", "run", "--resume"]) == 0
    assert differences("run", whole(name)) == []


@pytest.mark.usefixtures("undrawn")
def test_cuda_graphs_on_a_cpu_are_a_warning():
    message = "supervised: no CUDA graph, .*: the model must be on one GPU; it is on cpu"
    with pytest.warns(RuntimeWarning, match=message):
        assert main(CALLS["mlp"].argv("run", "--cuda-graphs", "True", "--device", "cpu")) == 0
    assert json.loads(Path("run/config.json").read_text())["options"]["train"]["cuda_graphs"] is True


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_the_same_model_from_torch_is_trained_beside(name, capsys, refused):
    assert main(CALLS[name].argv("run", "--compare-torch")) == 0
    printed = capsys.readouterr().out
    assert "trained in turns of 2 steps" in printed and "torch.nn" in printed
    assert float(printed.split("train/loss at most ")[1].split()[0]) < 1e-5
    assert "--compare-torch trains both" in refused(f"train {name} --out run --resume --compare-torch")


GPT = f"train gpt --data words.txt {SMALL} --context 16 --out o"
TINY_CNN = f"train cnn {DIGITS} --kernel-size 3 --channels 4 --out o"
WRONG = {  # a call -> what is said of it
    "train mlp --data nowhere": "nowhere: no such folder",
    "train mlp --data soccer --sizes 3 1": "--sizes must begin with 2 and end with 1 for this data; got 3 1",
    "train mlp --data soccer --sizes": "MLP: sizes must be two or more positive integers; got []",
    "train mlp --data soccer --loss cross_entropy": "--loss must be binary_cross_entropy for this data",
    "train mlp --data soccer --lr -1": "lr must be positive and finite; got -1.0",
    "train mlp --resume": "--resume needs --out, or --data, to know which run to go on with",
    "train ppo --resume": "--resume needs --out, or --prompts, to know which run to go on with",
    "train mlp --data soccer --resume": "no such folder, so there is no run to go on with",
    "train mlp --data soccer --out base": "holds a run of `primer-fast train gpt`, not of `primer-fast train mlp`",
    "train mlp --data soccer --strategy ddp": "--strategy ddp is for processes that torchrun starts",
    "train mlp --data soccer --strategy fsdp": "--strategy fsdp is for processes that torchrun starts",
    "train cnn --data soccer": "soccer: no such folder",
    "train cnn --data words.txt": "words.txt: no such folder",
    "train cnn --data .": "train-images-idx3-ubyte: no such file",
    f"{TINY_CNN} --channels 4 4": "CNN: every layer must leave at least one pixel; conv2 would leave none",
    f"{TINY_CNN} --loss binary_cross_entropy": "--loss must be cross_entropy for this data",
    f"train vit {DIGITS} --patch 4": "ViT: patch must divide height and width; got 4 and [6, 6]",
    f"{GPT} --heads 3": "Transformer: heads must divide width; got 3 and 16",
    f"{GPT} --context 400": "words.txt: the text is too short: the part to validate on must have",
    f"{GPT} --tokenizer words": "the tokenizer must be bytes, characters or a .json file; got 'words'",
    f"{GPT} --tokenizer no.json": "no.json: no such file, so there is no tokenizer to read",
    f"{GPT} --preset gpt9": "--preset must be one of primer, nanogpt-cpu, gpt2; got 'gpt9'",
    f"{GPT} --init-from nowhere": "nowhere",
    f"{GPT} --init-from hf": "--context must be the checkpoint's 12; got 16",
    "train dpo --data pairs.jsonl --model nowhere --out o": "nowhere: no such folder",
    "train ppo --prompts prompts.txt --model base --reward no": "must be the folder of a reward model or module",
    "train ppo --prompts prompts.txt --model base --reward no_such_module:f": "No module named 'no_such_module'",
    "sample nowhere": "nowhere: no such folder",
    "sample .": "not the folder of a run of `primer-fast train gpt`: it has no transformer.json",
    "sample base --prompt X5": "--prompt: CharacterTokenizer: the text must be made of the",
    "sample base --prompt gogogogogogogogo": "--prompt must fit the model's context of 12 tokens; got 16",
    "sample base --tokens 0": "--tokens must be positive; got 0",
    "sample base --temperature -1": "temperature must be 0 or more",
    "sample base --top-p 2": "top_p must be in (0, 1]",
    "align --text builtin": "--text is for sentences",
    "align --preferences a.jsonl --ratings b.tsv": "--preferences excludes --ratings",
    "align --ratings nowhere.tsv": "nowhere.tsv: no such file",
}


@pytest.mark.parametrize("call", WRONG)
def test_a_wrong_call_ends_with_one_line_and_begins_nothing(call, refused):
    gpt2(Path("hf"), 256)
    before = set(os.listdir())
    assert WRONG[call] in refused(call)
    assert set(os.listdir()) == before


def test_several_processes_need_a_strategy(monkeypatch, refused):
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = "--strategy none is for one process; ddp or fsdp for the 2"
    assert message in refused("train mlp --data soccer --strategy none")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("call", ["train mlp --data soccer", "sample base"])
def test_no_gpu(call, refused):
    assert "--device cuda: torch finds no GPU on this machine" in refused(f"{call} --device cuda")


OPTIONS = {  # a call whose options are wrong by themselves -> what is said of it
    "train mlp": "--data",
    "train mlp --data": "--data",
    "train mlp --data soccer --optimizer lion": "lion",
    "train mlp --data soccer --epochs many": "many",
    "train gpt --data words.txt --sample-tokens -1": "--sample-tokens must not be negative; got -1",
    "train sft --data pairs.jsonl --model base --held-out 1": "--held-out must be between 0 and 1; got 1.0",
    "train dpo --data pairs.jsonl --model base --held-out 0": "--held-out must be between 0 and 1; got 0.0",
    "align --kl-budget 0": "--kl-budget must be positive",
    "align --betas 0": "--betas must be positive numbers",
}


@pytest.mark.parametrize("call", OPTIONS)
def test_a_wrong_option_is_named(call, capsys):
    assert main(call.split()) == 2
    said = capsys.readouterr()
    assert OPTIONS[call] in said.err + said.out
