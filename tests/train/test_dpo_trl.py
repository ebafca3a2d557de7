"""TRL's DPOTrainer on the same GPT-2-shaped model and data: loss, gradients and logged metrics are ours."""

import os
import string

import pytest
import torch

from primer_fast.data.completions import encode_pairs
from primer_fast.data.preferences import Preference
from primer_fast.train import dpo
from primer_fast.train.settings import SMOOTHED_LOSSES

os.environ.setdefault("HF_HUB_OFFLINE", "1")
trl = pytest.importorskip("trl", reason="compares with TRL")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")

from primer_fast.models.pretrained import load_gpt2  # noqa: E402

pytestmark = pytest.mark.usefixtures("plain_path")

LETTERS = string.ascii_lowercase + " "
END = 0
PAIRS = [
    Preference(f"say {word} ", f"{word} " * (1 + i % 3), f"no {word[::-1]}"[: 3 + 2 * i])
    for i, word in enumerate(["alpha", "beta", "gamma", "delta", "epsilon", "zeta"])
]
STEPS = 3
NAMES = (
    "loss", "entropy", "grad_norm", "num_tokens", "learning_rate", "rewards/chosen", "rewards/rejected",
    "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected",
)  # fmt: skip


def make_tokenizer():
    """A token a letter."""
    vocab = {"<end>": END, "<pad>": 1} | {c: i + 2 for i, c in enumerate(LETTERS)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<pad>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<pad>")


def make_model(seed=0):
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=29, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=END, eos_token_id=END,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.2,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


class Watch(transformers.TrainerCallback):
    """Keeps every step's gradient, as it is when the optimizer takes it, and the logged metrics."""

    def __init__(self):
        self.gradients, self.rows = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **rest):
        self.gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})

    def on_log(self, args, state, control, logs=None, **rest):
        if "loss" in logs:
            self.rows.append(logs)


def train_theirs(folder, loss, label_smoothing):
    model, watch = make_model(), Watch()
    arguments = trl.DPOConfig(
        output_dir=str(folder), per_device_train_batch_size=len(PAIRS), max_steps=STEPS, learning_rate=1e-3, beta=0.3,
        loss_type=[loss], label_smoothing=label_smoothing, lr_scheduler_type="constant", logging_steps=1,
        report_to="none", use_cpu=True, bf16=False, max_length=None,
        save_strategy="no", disable_tqdm=True, optim="adamw_torch", max_grad_norm=1.0, remove_unused_columns=False,
    )  # fmt: skip
    rows = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in PAIRS]
    trainer = trl.DPOTrainer(
        model=model, ref_model=make_model(), args=arguments, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=make_tokenizer(), callbacks=[watch],
    )  # fmt: skip
    trainer.train()
    return watch


def as_ours(folder, tensors):
    """Tensors of their model by the names of ours: loaded as if they were weights."""
    carrier = make_model()
    with torch.no_grad():
        for name, p in carrier.named_parameters():
            p.copy_(tensors[name])
    carrier.save_pretrained(folder)
    return dict(load_gpt2(folder).named_parameters())


@pytest.mark.parametrize("loss", [loss for loss in dpo.LOSSES if loss != "cdpo"])  # which it has not
def test_the_same_loss_gradients_and_metrics(tmp_path, loss):
    smoothing = 0.1 if loss in SMOOTHED_LOSSES else 0.0
    watch = train_theirs(tmp_path / "trl", loss, smoothing)
    make_model().save_pretrained(tmp_path / "start")
    model = load_gpt2(tmp_path / "start")
    config = dpo.DPOConfig(
        loss=loss, label_smoothing=smoothing, beta=0.3, lr=1e-3, schedule="constant", batch_size=len(PAIRS),
        epochs=STEPS, log_every=1,
    )  # fmt: skip
    pairs = encode_pairs(PAIRS, lambda text: [LETTERS.index(c) + 2 for c in text], end=END, context=64)
    reference = dpo.reference_log_probs(load_gpt2(tmp_path / "start"), pairs, config)
    rows = []
    for step, row in enumerate(dpo.train(dpo.start(model, config), pairs, reference, config)):
        rows.append(row)
        want = as_ours(tmp_path / "gradient", watch.gradients[step])
        for name, p in model.named_parameters():
            scale = want[name].abs().max().item()
            near = {"rtol": 2e-3, "atol": 2e-3 * scale + 1e-7}
            torch.testing.assert_close(p.grad, want[name].detach(), **near, msg=lambda m, name=name: f"{name}: {m}")
    assert len(rows) == len(watch.rows) == STEPS
    for row, logged in zip(rows, watch.rows, strict=True):
        for name in NAMES:
            assert row[name] == pytest.approx(float(logged[name]), rel=2e-3, abs=2e-4), name
