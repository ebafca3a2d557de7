"""The procedures on completions as tasks: supervised fine-tuning, reward modelling, DPO, PPO."""

import copy
import dataclasses
import hashlib
import json
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch
from torch import Tensor

from primer_fast.cli.run.folder import read_safetensors, write_bytes, write_text
from primer_fast.cli.run.tasks import Task
from primer_fast.cli.train import preference_plots
from primer_fast.cli.train.pair_accuracy import accuracy_of, reward_accuracy
from primer_fast.data.completions import CompletionPairs, Completions
from primer_fast.data.tokenizers import Tokenizer
from primer_fast.models.generation import generate
from primer_fast.models.transformer import Transformer
from primer_fast.train import dpo, ppo, sft
from primer_fast.train import reward as reward_modelling
from primer_fast.train.parallel import ALONE, World
from primer_fast.train.scoring import Reward, RewardError

SAVES = 10  # checkpoints of a run
SHOWN = 3  # completions that are printed with each
WRITTEN = 20  # completions in sample.txt
ROOM = 200  # the most tokens of these


@dataclasses.dataclass
class CompletionTask(Task):
    """What the four have in common: a policy to start from, prompts to show it on."""

    base: Transformer  # where the run starts; not trained
    tokenizer: Tokenizer
    end: int
    prompts: list[Tensor]
    seed: int
    config: Any = dataclasses.field(init=False, repr=False, compare=False)  # of the procedure; set by ``start``
    title: ClassVar[str]
    temperature = 1.0
    step_name = "optimizer step"

    def start(self, model, config):
        self.config = config
        return super().start(model, config)

    def is_saved(self, step, config):
        last = self.steps(config)
        return step == last or step * SAVES // last > max(0, step - config.log_every) * SAVES // last

    def files(self, model):
        shape = json.dumps(dataclasses.asdict(self.base.config), indent=2) + "\n"
        return {"transformer.json": shape, "tokenizer.json": self.tokenizer.to_json()}

    def policy(self, model: Any) -> Transformer:
        """The part of ``model`` that writes."""
        return model

    def remark(self, model, row):
        if not self.is_saved(row["step"], self.config):
            return None
        return textwrap.indent("\n".join(self.sample(model, SHOWN)), "    ")

    def sample(self, model: torch.nn.Module, count: int) -> list[str]:
        """Completions of the first prompts, in turn; the same whenever the weights are the same."""
        policy = self.policy(model)
        device = next(policy.parameters()).device
        prompts = [self.prompts[i % len(self.prompts)].to(device) for i in range(count)]
        room = min(ROOM, policy.config.context - max(map(len, prompts)))
        written = generate(
            policy, prompts, max_new_tokens=room, temperature=self.temperature, stop_tokens=[self.end], seed=self.seed
        )
        rows = zip(prompts, written.completions(), strict=True)
        return [f"{self.text(prompt)} | {self.text(completion)}" for prompt, completion in rows]

    def text(self, ids: Tensor) -> str:
        return self.tokenizer.decode(i for i in ids.tolist() if i != self.end)

    def panels(self) -> list[tuple]:
        """What ``preference_plots.curves`` draws."""
        raise NotImplementedError

    def draw(self, folder, model, config, rows):
        name = type(self).title
        preference_plots.curves(folder / "curves.png", rows, name, self.panels(), self.step_name)
        write_text(folder / "sample.txt", "\n".join(self.lines(model)) + "\n")
        return ["curves.png", "sample.txt"]

    def lines(self, model: torch.nn.Module) -> list[str]:
        """Of sample.txt."""
        return self.sample(model, WRITTEN)


@dataclasses.dataclass
class SFTTask(CompletionTask):
    completions: Completions
    held_out: Completions
    title = "Supervised fine-tuning"

    @property
    def samples(self):
        return len(self.completions)

    def train(self, state, config, should_stop):
        return sft.train(state, self.completions, config, should_stop=should_stop)

    def describe(self, model, config):
        loss, before = (sft.evaluate(m, self.held_out) for m in (model, self.base.to(next(model.parameters()).device)))
        of = f"{len(self.held_out):,} held-out completions"
        return f"loss {loss:.4f} nats per {self.tokenizer.unit} of {of}, {before:.4f} before"

    def panels(self):
        return [(f"loss (nats per {self.tokenizer.unit})", ("loss",)), ("learning rate", ("learning_rate",))]


@dataclasses.dataclass
class PairTask(CompletionTask):
    """On preference pairs."""

    pairs: CompletionPairs
    held_out: CompletionPairs

    @property
    def samples(self):
        return len(self.pairs)


@dataclasses.dataclass
class RewardTask(PairTask):
    title = "Reward model"

    def remark(self, model, row):
        return None  # it writes nothing

    def train(self, state, config, should_stop):
        return reward_modelling.train(state, self.pairs, config, should_stop=should_stop)

    def finish(self, model):
        """Rewards of what was trained on get mean 0 and variance 1, whatever scale the loss left them."""
        model.normalise(reward_modelling.score(model, self.pairs.stacked()).to(model.mean.device))

    def describe(self, model, config):
        return f"right on {reward_accuracy(model, self.held_out)} held out"

    def panels(self):
        return [
            ("loss per pair (nats)", ("loss",)),
            ("pairs in the right order", ("accuracy",)),
            ("reward of a batch", ("min_reward", "mean_reward", "max_reward")),
        ]

    def lines(self, model):
        """Held-out completions from the best to the worst, in the model's eyes."""
        both = self.held_out.stacked()
        rewards = reward_modelling.score(model, both)
        order = rewards.argsort(descending=True, stable=True).tolist()
        shown = order if len(order) <= 2 * WRITTEN else order[:WRITTEN] + order[-WRITTEN:]
        rows = zip(both.tokens[shown], both.prompt_lengths[shown].tolist(), both.lengths[shown].tolist(), strict=True)
        texts = dict.fromkeys(
            f"{r:+7.3f}  {self.text(row[:a])} | {self.text(row[a:b])}"
            for r, (row, a, b) in zip(rewards[shown].tolist(), rows, strict=True)
        )
        return list(texts)


@dataclasses.dataclass
class DPOTask(PairTask):
    folder: Path  # of the run: the reference's log-probabilities are kept there
    title = "Direct preference optimisation"

    def train(self, state, config, should_stop):
        base = self.base.to(next(state.model.parameters()).device)
        reference = cached_reference(self.folder / "reference.safetensors", base, self.pairs, config, state.world)
        return dpo.train(state, self.pairs, reference, config, should_stop=should_stop)

    def describe(self, model, config):
        device = next(model.parameters()).device
        now, before = (dpo.reference_log_probs(m.to(device), self.held_out, config) for m in (model, self.base))
        ratios = now - before  # log pi / pi_ref of chosen and rejected
        right = accuracy_of(ratios[:, 0] > ratios[:, 1], self.held_out)
        return f"moved the right way on {right} held out, margin {config.beta * ratios.diff().neg().mean().item():.3f}"

    def panels(self):
        return [
            ("loss per pair", ("loss",)),
            ("pairs moved the right way", ("rewards/accuracies",)),
            ("implicit reward, beta log ratio", ("rewards/chosen", "rewards/rejected", "rewards/margins")),
        ]


@dataclasses.dataclass
class PPOTask(CompletionTask):
    reward: Reward
    title = "Proximal policy optimisation"
    step_name = "rollout"

    def start(self, model, config):
        self.config, self.temperature = config, config.temperature
        self.state = ppo.start(model, config)
        return self.state

    def reference(self) -> Transformer:
        return copy.deepcopy(self.base).to(next(self.state.model.parameters()).device).requires_grad_(False)

    def steps(self, config):
        return config.steps

    def epoch(self, step, config):
        return step * config.batch_size / len(self.prompts)

    def train(self, state, config, should_stop):
        return ppo.train(
            state, self.prompts, self.reference(), self.reward, config, end=self.end, should_stop=should_stop
        )

    def policy(self, model: Any) -> Transformer:
        return model.policy

    def weights(self, model):
        return model.policy.state_dict()

    def describe(self, model, config):
        """By completions of the finished policy."""
        try:
            _, row = ppo.roll_out(self.state, self.prompts, self.reference(), self.reward, config, self.end)
        except RewardError as error:
            return str(error)
        kl = f"KL {row['objective/kl']:.3f} nats per completion"
        return f"score {row['objective/scores']:.3f}, {kl}, over {config.batch_size:,} completions"

    def panels(self):
        return [
            ("score of a completion", ("objective/scores", "objective/rlhf_reward")),
            ("KL to the start (nats per completion)", ("objective/kl",)),
            ("share of tokens, squared log ratio", ("policy/clipfrac_avg", "policy/approxkl_avg")),
        ]


def cached_reference(
    path: Path, model: Transformer, pairs: CompletionPairs, config: dpo.DPOConfig, world: World = ALONE
) -> Tensor:
    """The reference's log-probabilities of the pairs, (N, 2), from ``path`` where they are of this model and data."""
    parts = {f"model.{name}": t for name, t in model.state_dict().items()}
    for side in ("chosen", "rejected"):
        parts |= {f"{side}.{field}": t for field, t in vars(getattr(pairs, side)).items()}
    key = sha256_of(repr((model.config, config.precision)), [(f"{name} ", t) for name, t in parts.items()])
    kept = None
    if path.exists():
        try:
            tensors, metadata = read_safetensors(path)
        except ValueError:  # cut short or damaged: made anew
            tensors, metadata = {}, {}
        if metadata.get("sha256") == key and tensors["log_probs"].shape == (len(pairs), 2):
            kept = tensors["log_probs"]
    missing = world.any(kept is None)
    if kept is not None and not missing:
        return kept
    log_probs = dpo.reference_log_probs(model, pairs, config, world)
    content = safetensors.torch.save({"log_probs": log_probs.contiguous()}, {"sha256": key})
    world.first(lambda: write_bytes(path, content))
    return log_probs


def sha256_of(beginning: str, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of a text and of tensors, with what stands before each, its shape and its dtype."""
    digest = hashlib.sha256(beginning.encode())
    for name, t in tensors:
        digest.update(f"{name}{tuple(t.shape)} {t.dtype}".encode())
        digest.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
