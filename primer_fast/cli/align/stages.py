"""The stages of `primer-fast align`: pretraining, reward model, PPO, DPO; each leaves a folder that others can use."""

import copy
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from primer_fast.cli.align.data import Material
from primer_fast.cli.align.folder import CHECKPOINTS, StageFolder
from primer_fast.cli.align.measure import Difference, Mean, Measured, PathPoint, Samples, best_possible, write
from primer_fast.cli.console import Display
from primer_fast.cli.interruption import Interruption
from primer_fast.cli.options.align import Options
from primer_fast.cli.run.folder import write_text
from primer_fast.cli.terminal import OutputClosed
from primer_fast.cli.train.pair_accuracy import Accuracy, reward_accuracy
from primer_fast.data.tokenizers import without_token
from primer_fast.models.actor_critic import ActorCritic
from primer_fast.models.reward import RewardModel
from primer_fast.models.transformer import Transformer, TransformerConfig
from primer_fast.train import dpo, language_model, ppo, sft
from primer_fast.train import reward as reward_modelling
from primer_fast.train.scoring import reward_of_model
from primer_fast.train.state import TrainState

SEED_OF_POINTS, SEED_OF_SAMPLES = 1, 2
SECONDS = "seconds.json"


@dataclass(frozen=True)
class Aligned:
    """A policy after its training: how it was measured then and on the way."""

    measured: Measured
    path: list[PathPoint]
    rows: list[dict[str, float]]  # its metrics
    in_budget: bool  # it ended by itself; else the KL budget ended it


@dataclass(frozen=True)
class Alignment:
    """The result of all stages: what the report is made of."""

    options: Options
    material: Material
    pretraining: list[dict[str, float]]  # metrics
    reward_rows: list[dict[str, float]]
    accuracy: Accuracy  # of the reward model on pairs of texts that were held out
    before: Measured
    ppo: Aligned
    dpo: dict[float, Aligned]  # by beta
    best_possible: list[tuple[float, float]]
    seconds: dict[str, float]  # of the stages

    @property
    def best_beta(self) -> float:
        """The DPO policy of most reward: the reward model chooses, no human rating is looked at."""
        return max(self.dpo, key=lambda beta: self.dpo[beta].measured.reward.mean)

    @property
    def policies(self) -> list[Measured]:
        """Before, after PPO, after DPO at the best beta."""
        return [self.before, self.ppo.measured, self.dpo[self.best_beta].measured]

    def gain(self, after: Measured, what: str) -> Difference:
        """By how much ``what`` ("reward", "known", "known_held_out") is higher than before the alignment."""
        return Difference(getattr(self.before, what), getattr(after, what))

    def to_json(self) -> dict:
        aligned = {"ppo": self.ppo} | {f"dpo beta {beta:g}": policy for beta, policy in self.dpo.items()}

        def gains(after: Measured) -> dict:
            kinds = ["reward"] + (["known", "known_held_out"] if self.material.ratings else [])
            return {kind: self.gain(after, kind).to_json() for kind in kinds}

        return {
            "pair_accuracy": {
                "right": self.accuracy.right, "total": self.accuracy.total, "interval": self.accuracy.interval
            },
            "before": self.before.to_json(),
            "after": {
                name: policy.measured.to_json() | {"gain": gains(policy.measured), "in_budget": policy.in_budget}
                for name, policy in aligned.items()
            },
            "paths": {
                name: [(p.step, p.kl.mean, p.kl.error, p.reward.mean, p.reward.error) for p in policy.path]
                for name, policy in aligned.items()
            },
            "best_possible": self.best_possible,
            "kl_budget": self.options.kl_budget,
            "seconds": self.seconds,
        }  # fmt: skip


def align(material: Material, options: Options, display: Display) -> Alignment:
    """All stages, in order; PPO and every DPO start from the same pretrained policy."""
    clock, seconds = time.perf_counter(), _seconds_before(options)

    def lap(name: str) -> None:
        nonlocal clock
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - clock
        write_text(options.out / SECONDS, json.dumps(seconds) + "\n")
        clock = time.perf_counter()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = TransformerConfig(
        vocab=material.tokenizer.vocab_size, context=material.context, width=options.width, layers=options.layers,
        heads=options.heads, norm="pre", positions="learned",
    )  # fmt: skip
    stages = Stages(material, options, display)
    model = Transformer(shape).to(device)
    model.exclude(without_token(material.tokenizer, shape.vocab))
    language, pretraining = stages.pretrain(model)
    lap("pretraining")
    reward, reward_rows, accuracy = stages.learn_reward(language)
    display.print(f"reward model: right on {accuracy} of texts held out")
    lap("reward model")
    samples = write(
        language, language, reward, material, count=options.samples, temperature=options.temperature,
        seed=options.seed + SEED_OF_SAMPLES,
    )  # fmt: skip
    before = Measured.of("before", samples, material)
    lap("measuring before")
    after_ppo = stages.ppo(language, reward)
    lap("PPO")
    after_dpo = {beta: stages.dpo(language, reward, beta) for beta in options.betas}
    lap("DPO")
    return Alignment(
        options, material, pretraining, reward_rows, accuracy, before, after_ppo, after_dpo,
        best_possible(samples), seconds,
    )  # fmt: skip


def _seconds_before(options: Options) -> dict[str, float]:
    """Seconds of the stages that earlier calls of a resumed run finished."""
    path = options.out / SECONDS
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if options.resume and path.exists() else {}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: not the times of stages, or damaged ({error})") from error


class Stages:
    def __init__(self, material: Material, options: Options, display: Display):
        self.material, self.options, self.display = material, options, display
        self.stop: BaseException | None = None  # what to end by once the stage is finished

    def pretrain(self, model: Transformer) -> tuple[Transformer, list[dict]]:
        """On running text where there is some, then on the completions; ratings play no part."""
        rows, text, corpus = [], self.material.running_text, self.material.corpus
        if text is not None:
            language = dataclasses.replace(self.options.language, seed=self.options.seed)
            steps = language.steps
            rows += self._learn("pretrain on text", "text", model, language_model, text, language, steps, "train/loss")
        config = dataclasses.replace(self.options.sft, seed=self.options.seed)
        steps = sft.total_steps(len(corpus), config)
        rows += self._learn("pretrain on completions", "language", model, sft, corpus, config, steps, "loss")
        return model.eval().requires_grad_(False), rows

    def learn_reward(self, language: Transformer) -> tuple[RewardModel, list[dict], Accuracy]:
        """From pairs, beginning with the language model's trunk; rewards of what is trained on get variance 1."""
        config, pairs = dataclasses.replace(self.options.reward, seed=self.options.seed), self.material.train_pairs
        torch.manual_seed(self.options.seed)
        model = RewardModel.from_language_model(language).requires_grad_(True).to(next(language.parameters()).device)
        steps = reward_modelling.total_steps(len(pairs), config)

        def scale() -> None:
            model.requires_grad_(False)
            model.normalise(reward_modelling.score(model, pairs.stacked()))

        rows = self._learn("reward model", "reward", model, reward_modelling, pairs, config, steps, "loss", scale)
        model.requires_grad_(False)
        return model, rows, reward_accuracy(model, self.material.test_pairs, self.options.seed)

    def _learn(
        self, name: str, folder: str, model: Transformer | RewardModel, procedure: ModuleType, data, config, steps: int,
        key: str, then: Callable[[], None] = lambda: None,
    ) -> list[dict]:  # fmt: skip
        """Train ``model`` by ``procedure``, a module of primer_fast.train, and call ``then``; -> metrics.

        Of a stage that an earlier call has finished the weights are loaded instead.
        """
        stage = self._stage(folder)
        if stage.finished(model) is None:
            state = procedure.start(model, config)
            stage.begin(state)
            self._train(name, stage, state, functools.partial(procedure.train, state, data, config), steps, key)
            then()
            self._finish(stage, model, {})
        return stage.run.rows()

    def ppo(self, language: Transformer, reward: RewardModel) -> Aligned:
        config = dataclasses.replace(
            self.options.ppo, max_new_tokens=self.material.context - self.material.longest_prompt,
            temperature=self.options.temperature, seed=self.options.seed,
        )  # fmt: skip
        policy = copy.deepcopy(language).requires_grad_(True)
        model = ActorCritic(policy, copy.deepcopy(reward).requires_grad_(True), config.kl_coefficient)
        state = ppo.start(model.to(next(language.parameters()).device), config)

        def train(should_stop):
            return ppo.train(
                state, self.material.prompts, language, reward_of_model(reward), config, end=self.material.end,
                should_stop=should_stop,
            )  # fmt: skip

        return self._align("PPO", "ppo", state, policy, language, reward, train, config.steps, "objective/scores")

    def dpo(self, language: Transformer, reward: RewardModel, beta: float) -> Aligned:
        pairs = self.material.train_pairs
        steps = dpo.total_steps(len(pairs), self.options.dpo)
        every = max(1, min(self.options.dpo.log_every, steps // (2 * self.options.points)))
        config = dataclasses.replace(self.options.dpo, beta=beta, seed=self.options.seed, log_every=every)
        policy = copy.deepcopy(language).requires_grad_(True)
        state = dpo.start(policy, config)

        def train(should_stop):
            reference = dpo.reference_log_probs(language, pairs, config)
            return dpo.train(state, pairs, reference, config, should_stop=should_stop)

        name = f"DPO, beta {beta:g}"
        return self._align(name, f"dpo-{beta:g}", state, policy, language, reward, train, steps, "loss")

    def _align(
        self, name: str, folder: str, state: TrainState, policy: Transformer, language: Transformer,
        reward: RewardModel, train: Callable[[Callable[[], bool]], Iterator[dict]], steps: int, key: str,
    ) -> Aligned:  # fmt: skip
        """Train and measure; once the KL exceeds the budget go back to the last measurement within it, and end."""
        options, device, stage = self.options, next(policy.parameters()).device, self._stage(folder)
        path: list[PathPoint] = []
        kept: dict[str, Tensor] = {}
        spent, due = False, 0.0
        found = stage.finished(policy)
        if found is not None:
            return self._measured(name, stage, policy, language, reward, found)

        def measure(step: int) -> bool:
            nonlocal kept
            samples = self._write(policy, language, reward, options.point_samples, SEED_OF_POINTS)
            point = PathPoint(step, Mean.of(samples.kl), Mean.of(samples.rewards))
            if point.kl.interval[1] > options.kl_budget:
                return True
            path.append(point)
            kept = {name: t.detach().clone() for name, t in policy.state_dict().items()}
            return False

        before = stage.begin(state)
        if before is None:
            measure(0)
            due = steps / options.points
        else:
            kept, notes = before
            path, due = [PathPoint.from_json(point) for point in notes["path"]], notes["due"]

        def watched(should_stop):
            nonlocal spent, due
            for row in train(lambda: spent or should_stop()):  # noqa: B023, the loop is to see it change
                if row["step"] >= due or row["step"] == steps:
                    due = row["step"] + steps / options.points
                    spent = measure(row["step"])
                yield row

        def notes_now() -> dict:
            return {"path": [dataclasses.asdict(point) for point in path], "due": due, "in_budget": not spent}

        self._train(name, stage, state, watched, steps, key, lambda: (kept, notes_now()))
        policy.load_state_dict({name: t.to(device) for name, t in kept.items()})
        self._finish(stage, policy, notes_now())
        return self._measured(name, stage, policy, language, reward, notes_now())

    def _measured(self, name: str, stage: StageFolder, policy: Transformer, language, reward, notes: dict) -> Aligned:
        policy.eval().requires_grad_(False)
        samples = self._write(policy, language, reward, self.options.samples, SEED_OF_SAMPLES)
        measured = Measured.of(name, samples, self.material)
        self.display.print(f"{name}: reward {measured.reward}, KL {measured.kl} nats")
        path = [PathPoint.from_json(point) for point in notes["path"]]
        return Aligned(measured, path, stage.run.rows(), notes["in_budget"])

    def _write(self, policy, language, reward, count: int, stream: int) -> Samples:
        return write(
            policy, language, reward, self.material, count=count, temperature=self.options.temperature,
            seed=self.options.seed + stream,
        )  # fmt: skip

    def _stage(self, folder: str) -> StageFolder:
        return StageFolder(self.options.out, folder, resume=self.options.resume)

    def _train(
        self, name: str, stage: StageFolder, state: TrainState, train: Callable[..., Iterator[dict]], steps: int,
        key: str, besides: Callable[[], tuple[dict, dict]] = lambda: ({}, {}),
    ) -> None:  # fmt: skip
        """Run a training to its end, with a progress bar, and its metrics and checkpoints in its folder.

        Where a signal stops it, or a reader of the progress that goes, a checkpoint is left and the whole run ends.

        Args:
            train: takes should_stop by name, and yields rows of metrics.
            besides: tensors and notes that a checkpoint has to hold too.
        """
        advance, saved = self.display.task(name, steps, state.step), state.step * CHECKPOINTS // steps
        with Interruption(self.display.print) as asked:
            for row in train(should_stop=lambda: asked.requested() or self.display.closed):
                stage.run.log(row)
                advance(row["step"], f"{key.split('/')[-1]} {row[key]:.3f}")
                if state.step * CHECKPOINTS // steps > saved:
                    saved = state.step * CHECKPOINTS // steps
                    stage.save(state, *besides())
            if asked.requested() or self.display.closed:
                self.stop = asked.stop() if asked.requested() else OutputClosed()
                if state.step < steps and besides()[1].get("in_budget", True):
                    stage.save(state, *besides())
                    raise self.stop

    def _finish(self, stage: StageFolder, model: Transformer | RewardModel, notes: dict) -> None:
        stage.finish(model, self.material.tokenizer, notes)
        if self.stop:
            raise self.stop
