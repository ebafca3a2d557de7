"""A DPO step of ours beside one of TRL's DPOTrainer, one after the other.

The same GPT-2-shaped model, pairs, loss and optimizer; TRL with the reference model in every step, as it comes, or with
its log-probabilities computed beforehand, as ours are. A step is data collation, forward, backward and update.
"""

import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from primer_fast.bench import goals, memory
from primer_fast.bench.op import OURS
from primer_fast.bench.report import ProgramRow
from primer_fast.bench.timing import wait
from primer_fast.data.completions import encode_pairs
from primer_fast.data.preferences import Preference
from primer_fast.models.pretrained import load_gpt2
from primer_fast.train import dpo

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.modules.setdefault("kernels", None)  # transformers looks for PyPI's package of that name; our folder is not it
END, PAD = 0, 1
TRL = "TRL's DPOTrainer"
SKIPPED = 2  # first steps, which allocate; the memory of the second is what is reported


@dataclass(frozen=True)
class Sizes:
    """Of the model and of a step's pairs."""

    vocab: int = 50257
    width: int = 128
    layers: int = 4
    heads: int = 4
    pairs: int = 8  # of a step
    prompt: int = 32  # tokens
    completion: int = 32  # tokens at most


def make_texts(shape: Sizes, count: int) -> list[Preference]:
    """Texts of numbers, a word a token: any vocabulary is covered."""
    draw = torch.Generator().manual_seed(0)

    def words(n):
        return " ".join(map(str, torch.randint(2, shape.vocab, (n,), generator=draw).tolist()))

    def length():
        return int(torch.randint(shape.completion // 2, shape.completion + 1, (), generator=draw))

    return [Preference(words(shape.prompt), " " + words(length()), " " + words(length())) for _ in range(count)]


def steps_of_both(shape: Sizes, steps: int, precomputed: bool, device: str = "cpu") -> dict:
    """Seconds of each step of both, in turns, their peak memory (bytes) in the second, and losses (ours, TRL's).

    Raises:
        ModuleNotFoundError: trl, transformers, tokenizers or datasets is not installed.
    """
    import datasets
    import tokenizers
    import transformers
    import trl

    pairs = make_texts(shape, shape.pairs * steps)
    vocab = {"<end>": END, "<pad>": PAD} | {str(i): i for i in range(2, shape.vocab)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<pad>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<pad>")

    def model():
        torch.manual_seed(0)
        sizes = {"n_positions": shape.prompt + shape.completion + 1, "n_embd": shape.width, "n_layer": shape.layers}
        drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        config = transformers.GPT2Config(
            vocab_size=shape.vocab, n_head=shape.heads, bos_token_id=END, eos_token_id=END, **sizes, **drop
        )
        return transformers.GPT2LMHeadModel(config)

    with tempfile.TemporaryDirectory() as folder:
        model().save_pretrained(folder)
        ours, frozen = load_gpt2(folder).to(device), load_gpt2(folder).to(device)
        config = dpo.DPOConfig(
            lr=1e-4, schedule="constant", batch_size=shape.pairs, epochs=1, log_every=1, steps=steps,
            precision="float32" if device == "cpu" else "bfloat16",
        )  # fmt: skip
        encoded = encode_pairs(pairs, lambda text: words.encode(text).ids, end=END, context=ours.config.context)
        reference = dpo.reference_log_probs(frozen, encoded, config)
        state = dpo.start(ours, config)
        seconds: dict[str, list[float]] = {"ours": [], "trl": []}
        losses: list[tuple[float, float]] = []
        peaks: dict[str, int | None] = {}

        class Turns(transformers.TrainerCallback):
            def on_step_begin(self, *args, **rest):
                self.resident = memory.begin(device) if state.step < SKIPPED else None
                wait(device)
                self.began = time.perf_counter()

            def on_step_end(self, *args, **rest):
                wait(device)
                seconds["trl"].append(time.perf_counter() - self.began)
                if state.step < SKIPPED:
                    peaks["trl"] = memory.end(device, self.resident)
                resident = memory.begin(device) if state.step < SKIPPED else None
                began = time.perf_counter()
                rows = torch.arange(state.step * shape.pairs, (state.step + 1) * shape.pairs)
                dpo.train_step(state, encoded[rows], reference[rows], config, steps)
                wait(device)
                seconds["ours"].append(time.perf_counter() - began)
                if state.step <= SKIPPED:
                    peaks["ours"] = memory.end(device, resident)

            def on_log(self, *args, logs=None, **rest):
                if "loss" in logs:
                    losses.append((state.window["loss"][-1].item(), float(logs["loss"])))

        arguments = trl.DPOConfig(
            output_dir=str(Path(folder) / "trl"), per_device_train_batch_size=shape.pairs, max_steps=steps,
            learning_rate=1e-4, lr_scheduler_type="constant", logging_steps=1, report_to="none",
            use_cpu=device == "cpu", bf16=device != "cpu", max_length=None, save_strategy="no", disable_tqdm=True,
            optim="adamw_torch_fused",
            precompute_ref_log_probs=precomputed, train_sampling_strategy="sequential",
        )  # fmt: skip
        rows = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs]
        trainer = trl.DPOTrainer(
            model=model(), ref_model=model(), args=arguments, train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer, callbacks=[Turns()],
        )  # fmt: skip
        trainer.train()
    return {"seconds": seconds, "peaks": peaks, "losses": losses, "trl": trl.__version__}


def beside_trl(steps: int = 6, shape: Sizes | None = None, device: str = "cpu") -> list[ProgramRow]:
    """Rows with TRL as it comes, and with the reference's log-probabilities precomputed in both."""
    shape, found = shape or Sizes(), []
    for precomputed in (False, True):
        measured = steps_of_both(shape, steps, precomputed, device)
        setting = (
            f"{shape.layers} layers, width {shape.width}, vocabulary {shape.vocab:,}, {shape.pairs} pairs of "
            f"{shape.prompt} + {shape.completion} tokens, TRL {measured['trl']}, reference "
            + ("precomputed in both" if precomputed else "as each comes: TRL's in every step")
        )
        seconds = {name: times[min(SKIPPED, len(times) - 1) :] for name, times in measured["seconds"].items()}
        apart = max(abs(a - b) for a, b in measured["losses"])
        for key, provider, column in (("ours", OURS, 0), ("trl", TRL, 1)):
            row = ProgramRow("dpo", setting, provider, unit="pairs", loss=measured["losses"][-1][column])
            row.time(seconds[key], seconds["ours"], shape.pairs)
            peak = measured["peaks"].get(key)
            row.peak_mib = None if peak is None else peak / 2**20
            found.append(row)
        found[-1].loss_difference = apart
        equal = apart <= (1e-3 if device == "cpu" else 2e-2)
        found[-1].targets.append(goals.DPO.judged(found[-1].versus) | ({} if equal else {"met": False}))
    return found
