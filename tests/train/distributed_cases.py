"""What tests/train/test_distributed.py trains: in one process there, and here in the two that it starts.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... [TRITON_INTERPRET=1] python distributed_cases.py FOLDER [cuda]
The first process writes what it finds to FOLDER/found.pt.
"""

import dataclasses
import sys
from pathlib import Path

import procedures
import safetensors.torch
import torch
from procedures import DPO, PPO, PRE, SFT, Language, Reward, Supervised, go_on, images, mlp

from primer_fast import backend
from primer_fast.cli.run import sharded_checkpoint
from primer_fast.cli.run.folder import read_safetensors
from primer_fast.models.cnn import CNN, CNNConfig
from primer_fast.models.vit import ViT, ViTConfig
from primer_fast.train import supervised
from primer_fast.train.parallel import ALONE, joined, whole
from primer_fast.train.scoring import RewardError
from primer_fast.train.state import distribute, pack, unpack

CASES = {
    "supervised-mlp": Supervised(mlp),
    "supervised-cnn": Supervised(
        lambda: CNN(CNNConfig((1, 8, 8), channels=(3, 5), kernel_size=2, hidden=(6,), classes=3)),
        optimizer="sgd", momentum=0.9, augmentation="shift",
    ),
    "supervised-vit": Supervised(
        lambda: ViT(ViTConfig((1, 8, 8), patch=4, width=16, layers=2, heads=2, classes=3)), optimizer="sgd"
    ),
    "language-model-post-norm": Language(),
    "language-model-pre-norm": Language(dataclasses.replace(PRE, tied=False, kv_heads=1), accumulate=1),
    "sft": SFT(),
    "reward": Reward(),
    "dpo-sigmoid": DPO("sigmoid"),
    "ppo": PPO(steps=2),
    "ppo-shared-critic": PPO("shared", steps=2, stop_kl=1e-3, accumulate=2),
}  # fmt: skip
TINY = dataclasses.replace(PRE, context=8, width=8, layers=1, heads=1)
KERNELS = {  # few steps: Triton's interpreter runs the kernels
    "cnn": Supervised(
        lambda: CNN(CNNConfig((1, 8, 8), channels=(3,), kernel_size=3, hidden=(), classes=3)), steps=1, accumulate=1
    ),
    "gpt": Language(TINY, steps=2, batch_size=3, eval_batches=1),
    "dpo": DPO("sigmoid", TINY, steps=1, accumulate=1),
}
DROPOUT = Language(dataclasses.replace(PRE, dropout=0.2))


def begin(case, world, strategy):
    torch.manual_seed(0)
    state, config = case.start()
    distribute(state, world, strategy)
    torch.manual_seed(world.rank)
    return state, config


def result(state, rows):
    """-> rows, weights and the optimizer's state, all of it."""
    return rows, {name: whole(t).cpu().clone() for name, t in state.model.state_dict().items()}


def run(case, world=ALONE, strategy="none"):
    state, config = begin(case, world, strategy)
    return result(state, go_on(case, state, config))


def save(folder, state):
    if state.is_sharded:
        sharded_checkpoint.save(folder, state, {}, 0.0)
    else:
        content = pack(state, {}, 0.0)
        if state.world.rank == 0:
            safetensors.torch.save_file(*content[:1], folder / "checkpoint.safetensors", content[1])
        state.world.any(False)


def load(folder, state):
    path = sharded_checkpoint.newest(folder)
    content = sharded_checkpoint.load(path, state) if path else read_safetensors(folder / "checkpoint.safetensors")
    unpack(state, *content)


def resumed(case, folder, world=ALONE, strategy="none"):
    """From the checkpoint in ``folder`` to the end."""
    state, config = begin(case, world, strategy)
    load(folder, state)
    return result(state, go_on(case, state, config))


def halves(case, folder, world, strategy):
    """Stop after two steps, save, load into a state made anew, go on."""
    folder.mkdir(exist_ok=True)
    state, config = begin(case, world, strategy)
    first = go_on(case, state, config, stop=2)
    save(folder, state)
    rows, weights = resumed(case, folder, world, strategy)
    return first + rows, weights


def skipped_steps(world, strategy):
    """float16, and one sample whose gradient overflows. -> the scale and the weights of every process after a step."""
    torch.manual_seed(0)
    config = supervised.SupervisedConfig(batch_size=4, steps=1, precision="float16")
    state = supervised.start(mlp().to(procedures.device), config)
    before = [p.detach().clone() for p in state.model.parameters()]
    distribute(state, world, strategy)
    inputs, targets = images(4)
    inputs[0] *= 1000
    list(supervised.train(state, inputs, targets, config))
    moved = any(not torch.equal(whole(p), b) for p, b in zip(state.model.parameters(), before, strict=True))
    return world.collect((state.scaler.get_scale(), moved))


def failure(case, world, strategy, kind):
    """-> of every process, the message of the error that training ends with"""
    state, config = begin(case, world, strategy)
    try:
        go_on(case, state, config)
    except kind as error:
        return world.collect((str(error), state.step))
    return world.collect(None)


class Diverging(Supervised):
    """A sample that is not a number: in each step one process sees it, at most."""

    def train(self, state, config, should_stop):
        inputs, targets = images(11)
        inputs[3, 0, 0] = torch.nan
        return supervised.train(state, inputs, targets, config, should_stop=should_stop)


def raises_in_one(rank):
    def function(prompts, completions):
        if rank == 1:
            raise KeyError("no such word")
        return [0.0] * len(prompts)

    return function


def stopped(case, world, strategy):
    """Only the second process is asked to stop, after two steps. -> the step of each at its end"""
    state, config = begin(case, world, strategy)
    list(case.train(state, config, lambda: world.any(world.rank == 1 and state.step == 2)))
    return world.collect(state.step)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    interprets = backend.interpreting
    with joined(procedures.device) as world:
        found = {}
        backend.interpreting, backend.stand_in = False, None  # plain PyTorch on a CPU
        gpt = CASES["language-model-post-norm"]
        if world.rank == 0:
            halves(gpt, folder / "one", ALONE, "none")
        world.any(False)
        for strategy in ("ddp", "fsdp"):
            for name, case in CASES.items():
                found[strategy, name] = world.collect(run(case, world, strategy))
            found[strategy, "halves"] = halves(gpt, folder / strategy, world, strategy)
            found[strategy, "dropout"] = run(DROPOUT, world, strategy)
            found[strategy, "dropout-halves"] = halves(DROPOUT, folder / f"dropout-{strategy}", world, strategy)
            found[strategy, "from one"] = resumed(gpt, folder / "one", world, strategy)
            found[strategy, "float16"] = skipped_steps(world, strategy)
            found[strategy, "nan"] = failure(Diverging(mlp), world, strategy, FloatingPointError)
            found[strategy, "no reward"] = failure(PPO(reward=raises_in_one(world.rank)), world, strategy, RewardError)
            found[strategy, "stopped"] = stopped(gpt, world, strategy)
        for strategy, other in (("ddp", "fsdp"), ("fsdp", "ddp")):
            found[strategy, "from the other"] = resumed(gpt, folder / other, world, strategy)
            if interprets:
                backend.interpreting, backend.stand_in = True, "cpu"
                for name, case in KERNELS.items():
                    found[strategy, name] = world.collect(run(case, world, strategy))
                backend.interpreting, backend.stand_in = False, None
        if world.rank == 0:
            torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    procedures.device = "cuda" if "cuda" in sys.argv[2:] else "cpu"
    main(Path(sys.argv[1]))
