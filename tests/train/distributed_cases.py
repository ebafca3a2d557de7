"""What tests/train/test_distributed.py trains: in one process there, and here in the two that it starts.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python distributed_cases.py FOLDER [cuda | kernels]
The first process writes what it finds to FOLDER/found.pt.
"""

import dataclasses
import sys
from pathlib import Path

import safetensors.torch
import torch

from primer_fast.cli import sharded_checkpoint
from primer_fast.cli.run_folder import read_safetensors
from primer_fast.data.completions import encode_completions, encode_pairs
from primer_fast.data.preferences import Preference
from primer_fast.data.text import TokenizedText
from primer_fast.models.actor_critic import ActorCritic
from primer_fast.models.cnn import CNN, CNNConfig
from primer_fast.models.mlp import MLP, MLPConfig
from primer_fast.models.reward import RewardModel
from primer_fast.models.transformer import Transformer, TransformerConfig
from primer_fast.models.vit import ViT, ViTConfig
from primer_fast.train import dpo, language_model, ppo, reward, sft, supervised
from primer_fast.train.parallel import ALONE, joined, whole
from primer_fast.train.scoring import RewardError, reward_of_lists
from primer_fast.train.state import distribute, pack, unpack

device = "cpu"
END = 0
# Without biases: the gradient of a key's is 0 but for rounding, which AdamW blows up to whole steps.
SHAPE = TransformerConfig(vocab=12, context=16, width=16, layers=2, heads=2, bias=False)
PRE = dataclasses.replace(SHAPE, norm="pre", positions="learned", activation="gelu_tanh")
SMALL = {"lr": 1e-2, "batch_size": 4, "accumulate": 2, "log_every": 1, "warmup_steps": 1}
WORDS = [("ab"[: i % 3], "cd" * (1 + i % 4) + "efg"[: 1 + i % 3]) for i in range(11)]
PAIRS = [Preference(prompt, completion, "gfedc"[: 1 + i % 5], i / 8) for i, (prompt, completion) in enumerate(WORDS)]


def encode(text):
    return [ord(c) - 96 for c in text]


def text():
    tokens = (torch.arange(300) * torch.arange(300) % 11).to(torch.uint16)
    return TokenizedText(tokens[:200], tokens[200:])


def images(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(count, 8, 8, generator=g), torch.randint(0, 3, (count,), generator=g)


def count_of_3(prompts, completions):
    return [float(tokens.count(3)) for tokens in completions]


class Supervised:
    """Eleven samples in batches of four, each in two micro-batches: of the last, of one sample, a process has none."""

    def __init__(self, make, **options):
        self.make, self.options = make, options

    def start(self, steps=None):
        config = supervised.SupervisedConfig(**{**SMALL, "epochs": 2, "steps": steps, **self.options})
        return supervised.start(self.make().to(device), config), config

    def train(self, state, config, should_stop):
        return supervised.train(state, *images(11), config, test=images(5, seed=1), should_stop=should_stop)


class Language:
    def __init__(self, shape=SHAPE, **options):
        self.shape, self.options = shape, options

    def start(self):
        options = {**SMALL, "steps": 4, "batch_size": 5, "eval_every": 2, **self.options}
        config = language_model.LanguageModelConfig(**options)
        return language_model.start(Transformer(self.shape).to(device), config), config

    def train(self, state, config, should_stop):
        return language_model.train(state, text(), config, should_stop=should_stop)


class SFT:
    def start(self):
        config = sft.SFTConfig(**SMALL)
        return sft.start(Transformer(PRE).to(device), config), config

    def train(self, state, config, should_stop):
        completions = encode_completions(WORDS, encode, end=END, context=16)
        return sft.train(state, completions, config, should_stop=should_stop)


class Reward:
    """With logits of its trunk's own, that nothing is trained by."""

    def start(self):
        config = reward.RewardConfig(**SMALL, margins=True, centring=0.1)
        return reward.start(RewardModel(dataclasses.replace(PRE, tied=False)).to(device), config), config

    def train(self, state, config, should_stop):
        return reward.train(state, encode_pairs(PAIRS, encode, end=END, context=16), config, should_stop=should_stop)


class DPO:
    def __init__(self, loss, shape=PRE, **options):
        self.loss, self.shape, self.options = loss, shape, options

    def start(self):
        config = dpo.DPOConfig(**{**SMALL, "loss": self.loss, **self.options})
        return dpo.start(Transformer(self.shape).to(device), config), config

    def train(self, state, config, should_stop):
        pairs = encode_pairs(PAIRS, encode, end=END, context=16)
        if self.shape.context < 16:
            pairs = pairs[pairs.stacked().lengths.view(2, -1).amax(0) <= self.shape.context]
        torch.manual_seed(0)
        reference = dpo.reference_log_probs(Transformer(self.shape).to(device), pairs, config, state.world)
        return dpo.train(state, pairs, reference, config, should_stop=should_stop)


class PPO:
    def __init__(self, critic=None, reward=count_of_3, **options):
        self.critic, self.reward, self.options = critic, reward, options

    def start(self):
        config = ppo.PPOConfig(**{
            "steps": 3, "batch_size": 7, "minibatches": 4, "epochs": 2, "max_new_tokens": 5, "temperature": 1.0,
            "lr": 3e-3, "kl_target": 0.1, "kl_horizon": 50, "whiten_rewards": True, **self.options,
        })  # fmt: skip
        torch.manual_seed(0)
        return ppo.start(ActorCritic(Transformer(PRE), self.critic).to(device), config), config

    def train(self, state, config, should_stop):
        torch.manual_seed(0)
        prompts = [torch.tensor(p) for p in ([1], [1, 3], [1, 4, 5])]
        reference, function = Transformer(PRE).to(device), reward_of_lists(self.reward)
        return ppo.train(state, prompts, reference, function, config, end=END, should_stop=should_stop)


CASES = {
    "supervised-mlp": Supervised(lambda: MLP(MLPConfig((64, 16, 3)))),
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
    "dpo-ipo": DPO("ipo"),
    "ppo": PPO(),
    "ppo-shared-critic": PPO("shared", stop_kl=1e-3, accumulate=2),
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


def go_on(case, state, config, stop=None):
    """Train to the end, or to step ``stop``. -> the rows"""
    rows = list(case.train(state, config, lambda: state.step == stop))
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


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
    state = supervised.start(MLP(MLPConfig((64, 16, 3))).to(device), config)
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


def main(folder: Path, cases: dict) -> None:
    torch.set_num_threads(1)
    with joined(device) as world:
        if cases is KERNELS:
            found = {(s, name): run(case, world, s) for name, case in cases.items() for s in ("ddp", "fsdp")}
            if world.rank == 0:
                torch.save(found, folder / "found.pt")
            return
        found = {}
        gpt = CASES["language-model-post-norm"]
        if world.rank == 0:
            halves(gpt, folder / "one", ALONE, "none")
        world.any(False)
        for strategy in ("ddp", "fsdp"):
            for name, case in cases.items():
                found[strategy, name] = world.collect(run(case, world, strategy))
            found[strategy, "halves"] = halves(gpt, folder / strategy, world, strategy)
            found[strategy, "dropout"] = run(DROPOUT, world, strategy)
            found[strategy, "dropout-halves"] = halves(DROPOUT, folder / f"dropout-{strategy}", world, strategy)
            found[strategy, "from one"] = resumed(gpt, folder / "one", world, strategy)
            found[strategy, "float16"] = skipped_steps(world, strategy)
            found[strategy, "nan"] = failure(
                Diverging(lambda: MLP(MLPConfig((64, 16, 3)))), world, strategy, FloatingPointError
            )
            found[strategy, "reward raises"] = failure(
                PPO(reward=raises_in_one(world.rank)), world, strategy, RewardError
            )
            found[strategy, "stopped"] = stopped(gpt, world, strategy)
        for strategy, other in (("ddp", "fsdp"), ("fsdp", "ddp")):
            found[strategy, "from the other"] = resumed(gpt, folder / other, world, strategy)
        if world.rank == 0:
            torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    device = "cuda" if "cuda" in sys.argv[2:] else "cpu"
    main(Path(sys.argv[1]), KERNELS if "kernels" in sys.argv[2:] else CASES)
