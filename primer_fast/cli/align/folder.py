"""A stage of `primer-fast align` on the disk: one that is finished is not done again, one that was stopped goes on."""

import dataclasses
import json
from pathlib import Path

import torch
from torch import Tensor

from primer_fast.cli.align.data import Material
from primer_fast.cli.run.folder import RunFolder, load_weights, read_safetensors
from primer_fast.cli.train.preference_tasks import sha256_of
from primer_fast.data.tokenizers import Tokenizer
from primer_fast.models.reward import RewardModel
from primer_fast.models.transformer import Transformer
from primer_fast.train.state import TrainState, pack, unpack

CHECKPOINTS = 5  # of a stage
KEPT, NOTES = "kept.", "notes"


class StageFolder:
    """The folder ``name`` in ``out``: metrics and checkpoints while it trains, then weights and what was found.

    Raises (any method):
        ValueError: a file is not what it should be; names it.
        WriteError: a file cannot be written.
    """

    def __init__(self, out: Path, name: str, *, resume: bool):
        self.run = RunFolder(out / name, f"align {name}")
        self.resume = resume and self.run.config.is_file()

    def finished(self, model: torch.nn.Module) -> dict | None:
        """Load the weights into ``model`` and return what was noted with them, if the stage is finished; else None."""
        if not (self.resume and self.run.weights.exists()):
            return None
        tensors, metadata = read_safetensors(self.run.weights)
        if NOTES not in metadata:
            return None
        load_weights(model, tensors, f"{self.run.weights}: not the weights of this stage")
        return json.loads(metadata[NOTES])

    def begin(self, state: TrainState) -> tuple[dict[str, Tensor], dict] | None:
        """Go on from the checkpoint: its kept tensors and notes. Without one begin the folder anew and return None."""
        if not (self.resume and self.run.checkpoint.exists()):
            self.run.begin({}, overwrite=True)
            return None
        tensors, metadata = self.run.load_checkpoint()
        try:
            unpack(state, tensors, metadata)
            notes = json.loads(metadata[NOTES])
        except (KeyError, ValueError) as error:
            raise ValueError(f"{self.run.checkpoint}: {error}") from error
        self.run.cut_metrics(state.step)
        return {name.removeprefix(KEPT): t for name, t in tensors.items() if name.startswith(KEPT)}, notes

    def save(self, state: TrainState, kept: dict[str, Tensor], notes: dict) -> None:
        """Write a checkpoint of ``state``, with tensors and notes that ``begin`` gives back."""
        tensors, metadata = pack(state, {}, 0.0)
        tensors |= {KEPT + name: t.detach().to("cpu", copy=True).contiguous() for name, t in kept.items()}
        self.run.save_checkpoint(tensors, metadata | {NOTES: json.dumps(notes)})

    def finish(self, model: Transformer | RewardModel, tokenizer: Tokenizer, notes: dict) -> None:
        """Write the weights and all that others need to use them; from here on the stage is finished."""
        self.run.write_files({
            "transformer.json": json.dumps(dataclasses.asdict(model.config), indent=2) + "\n",
            "tokenizer.json": tokenizer.to_json(),
        })  # fmt: skip
        self.run.save_weights(model.state_dict(), {NOTES: json.dumps(notes)})


def forget(out: Path) -> None:
    """Clear the stages of an earlier run."""
    names = ("text", "language", "reward", "ppo", *(path.name for path in out.glob("dpo-*")))
    for name in names:
        stage = RunFolder(out / name, f"align {name}")
        if stage.config.is_file():
            stage.begin({}, overwrite=True)


def fingerprint(material: Material) -> str:
    """SHA-256 of all that the stages learn from."""
    parts = [material.corpus, material.train_pairs.stacked(), material.test_pairs.stacked()]
    tensors = [t for part in parts for t in (part.tokens, part.prompt_lengths, part.lengths)]
    tensors += [*material.prompts, *material.test_prompts]
    if material.running_text is not None:
        tensors += [material.running_text.train, material.running_text.validation]
    return sha256_of(material.tokenizer.to_json(), [("", t) for t in tensors])
