"""Checkpoints of small random models that `transformers` itself writes, against what `transformers` computes."""

import json
import os
import sys

import pytest
import torch
from parity import padded, varied

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("safetensors")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from primer_fast.models.generation import generate  # noqa: E402
from primer_fast.models.pretrained import load_bert, load_gpt2  # noqa: E402

pytestmark = pytest.mark.usefixtures("plain_path")
GPT2 = {"vocab_size": 101, "n_positions": 24, "n_embd": 32, "n_layer": 3, "n_head": 4, "bos_token_id": 0}
GPT2 |= {"eos_token_id": 0}
BERT = {"vocab_size": 101, "max_position_embeddings": 24, "hidden_size": 32, "num_hidden_layers": 3}
BERT |= {"num_attention_heads": 4, "intermediate_size": 80, "initializer_range": 0.2}


def randomised(model):
    torch.manual_seed(1)
    return varied(model, 0.2).eval()


def gpt2(kind="GPT2LMHeadModel", **options):
    return randomised(getattr(transformers, kind)(transformers.GPT2Config(**GPT2, **options)))


def bert(kind="BertForMaskedLM", **options):
    return randomised(getattr(transformers, kind)(transformers.BertConfig(**BERT, **options)))


@pytest.fixture(scope="module")
def saved_gpt2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    gpt2().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved_bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    bert().save_pretrained(folder)
    return folder


def texts(side):
    return padded(side, (17, 9, 1), (0, 101))


@torch.no_grad()
def gpt2_logits(theirs, tokens, mask):
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return theirs(tokens, attention_mask=mask.long(), position_ids=positions).logits


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation_function": "relu", "n_inner": 48},
        {"activation_function": "gelu", "tie_word_embeddings": False},
        {"layer_norm_epsilon": 1e-2, "reorder_and_upcast_attn": True},
    ],
    ids=lambda options: " ".join(map(str, options.values())) or "default",
)
def test_gpt2_logits(tmp_path, options):
    theirs = gpt2(**options)
    theirs.save_pretrained(tmp_path)
    ours = load_gpt2(tmp_path).eval()
    tokens, _ = texts("right")
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert expected.std() > 0.5
        assert (ours(tokens) - expected).abs().max() <= 1e-4
        for side in ("left", "right"):
            tokens, mask = texts(side)
            expected = gpt2_logits(theirs, tokens, mask)
            assert (ours(tokens, mask=mask) - expected)[mask].abs().max() <= 1e-4
        lengths = mask.sum(1)  # of the right-padded
        assert (ours(tokens, lengths=lengths) - expected)[mask].abs().max() <= 1e-4


@pytest.mark.parametrize(
    "options", [{}, {"hidden_act": "relu"}, {"hidden_act": "gelu_new", "tie_word_embeddings": False}], ids=str
)
def test_bert_hidden_states_and_logits(tmp_path, options):
    theirs = bert(**options)
    theirs.save_pretrained(tmp_path)
    ours = load_bert(tmp_path).eval()
    segments = torch.randint(2, (3, 17))
    for side in ("left", "right"):
        tokens, mask = texts(side)
        with torch.no_grad():
            inputs = {"input_ids": tokens, "attention_mask": mask.long(), "token_type_ids": segments}
            logits, hidden = theirs(**inputs).logits, theirs.bert(**inputs).last_hidden_state
            assert logits.std() > 0.5
            assert (ours(tokens, mask=mask, segments=segments) - logits)[mask].abs().max() <= 1e-4
            assert (ours.hidden(tokens, mask=mask, segments=segments) - hidden)[mask].abs().max() <= 1e-4
            without = theirs(input_ids=tokens, attention_mask=mask.long()).logits
            assert (ours(tokens, mask=mask) - without)[mask].abs().max() <= 1e-4
            assert (
                ours(tokens, segments=segments) - theirs(tokens, token_type_ids=segments).logits
            ).abs().max() <= 1e-4
    with torch.no_grad():
        assert (ours(tokens, lengths=mask.sum(1)) - without)[mask].abs().max() <= 1e-4  # padded on the right


def test_masked_language_loss_is_theirs(saved_bert):
    theirs, ours = transformers.BertForMaskedLM.from_pretrained(saved_bert).eval(), load_bert(saved_bert).eval()
    tokens, _ = texts("right")
    labels = torch.where(torch.rand(tokens.shape) < 0.3, tokens, -100)
    assert ours.loss(tokens, labels).item() == pytest.approx(theirs(tokens, labels=labels).loss.item(), abs=1e-5)


@pytest.mark.parametrize("kind", ["BertModel", "BertForPreTraining"])
def test_other_bert_classes(tmp_path, kind):
    theirs = bert(kind)
    theirs.save_pretrained(tmp_path)
    ours, (tokens, _) = load_bert(tmp_path).eval(), texts("left")
    assert ours.config.head_transform == (kind != "BertModel")
    with torch.no_grad():
        hidden = (theirs if kind == "BertModel" else theirs.bert)(tokens).last_hidden_state
        assert (ours.hidden(tokens) - hidden).abs().max() <= 1e-4


def test_decoder_without_its_head_and_prefix(tmp_path, saved_gpt2):
    theirs = gpt2("GPT2Model")
    theirs.save_pretrained(tmp_path)
    assert "wte.weight" in load_file(tmp_path / "model.safetensors")
    ours, (tokens, _) = load_gpt2(tmp_path).eval(), texts("left")
    with torch.no_grad():
        assert (ours.hidden(tokens) - theirs(tokens).last_hidden_state).abs().max() <= 1e-4


def test_shards_single_file_and_folder_are_the_same(tmp_path, saved_gpt2):
    theirs = transformers.GPT2LMHeadModel.from_pretrained(saved_gpt2)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    expected = load_gpt2(saved_gpt2).state_dict()
    for path in (tmp_path, str(saved_gpt2 / "model.safetensors")):
        for name, tensor in load_gpt2(path).state_dict().items():
            assert torch.equal(tensor, expected[name]), name


def rewritten(folder, into, tensors=lambda tensors: tensors, **settings):
    """A copy of a checkpoint with other tensors or settings."""
    config = json.loads((folder / "config.json").read_text()) | settings
    (into / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    save_file(tensors(load_file(folder / "model.safetensors")), into / "model.safetensors")
    return into


def test_old_names_and_buffers(tmp_path, saved_bert, saved_gpt2):
    def old_bert(tensors):
        names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        tensors = {k.replace("LayerNorm.weight", "LayerNorm.gamma"): v for k, v in tensors.items()}
        tensors = {k.replace("LayerNorm.bias", names["LayerNorm.bias"]): v for k, v in tensors.items()}
        return tensors | {"bert.embeddings.position_ids": torch.arange(24)[None]}

    def old_gpt2(tensors):
        masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 24, 24).tril() for i in range(3)}
        return tensors | masks | {"transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}

    for load, folder, change in ((load_bert, saved_bert, old_bert), (load_gpt2, saved_gpt2, old_gpt2)):
        got, expected = load(rewritten(folder, tmp_path, change)).state_dict(), load(folder).state_dict()
        assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_half_precision_files_become_float32(tmp_path, saved_gpt2):
    halved = rewritten(saved_gpt2, tmp_path, lambda tensors: {k: v.bfloat16() for k, v in tensors.items()})
    model = load_gpt2(halved, dropout=0.1)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and model.config.dropout == 0.1
    expected = load_gpt2(saved_gpt2).embedding.weight.bfloat16().float()
    assert torch.equal(model.embedding.weight, expected) and model.embedding.weight.requires_grad


def without(key):
    return lambda tensors: {k: v for k, v in tensors.items() if k != key}


WRONG = {  # a change of a checkpoint, and what is said of it
    "missing": ({"tensors": without("transformer.h.1.attn.c_attn.bias")}, r"missing tensors: h.1.attn.c_attn.bias$"),
    "unexpected": ({"tensors": lambda t: t | {"h.9.ln_1.bias": t["transformer.ln_f.bias"].clone()}},
                   r"unexpected tensors: h.9.ln_1.bias$"),
    "shape": ({"tensors": lambda t: t | {"transformer.wpe.weight": torch.zeros(23, 32)}},
              r"model.safetensors: transformer.wpe.weight must be \(24, 32\); got \(23, 32\)"),
    "not transposed": ({"tensors": lambda t: t | {"transformer.h.0.mlp.c_fc.weight": torch.zeros(128, 32)}},
                       r"transformer.h.0.mlp.c_fc.weight must be \(32, 128\); got \(128, 32\)"),
    "more layers": ({"n_layer": 4}, r"missing tensors: h.3.attn.c_attn.bias, .* and 4 more"),
    "fewer layers": ({"n_layer": 2}, "unexpected tensors: h.2.attn.c_attn.bias, "),
    "activation": ({"activation_function": "silu"}, "config.json: activation_function must be one of gelu, .*'silu'"),
    "layer scale": ({"scale_attn_by_inverse_layer_idx": True}, "config.json: scale_attn_by_inverse_layer_idx must be"),
    "no scale": ({"scale_attn_weights": False}, "config.json: scale_attn_weights must be True; got False"),
    "another model": ({"model_type": "llama"}, "config.json: model_type must be 'gpt2'; got 'llama'"),
    "no size": ({"n_embd": ...}, "config.json: n_embd must be given"),
    "heads": ({"n_head": 5}, "config.json: Transformer: heads must divide width; got 5 and 32"),
    "BERT: head": ({"tensors": without("cls.predictions.bias")}, "missing tensors: cls.predictions.bias"),
    "BERT: value": ({"tensors": without("bert.encoder.layer.2.attention.self.value.weight")},
                    "layer.2.attention.self.value"),
    "BERT: shape": ({"tensors": lambda t: t | {"bert.encoder.layer.0.attention.self.key.bias": torch.zeros(31)}},
              r"bert.encoder.layer.0.attention.self.key.bias must be \(32,\); got \(31,\)"),
    "BERT: decoder": ({"is_decoder": True}, "is_decoder must be False"),
    "BERT: relative": ({"position_embedding_type": "relative_key"}, "position_embedding_type must be 'absolute'"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_checkpoint_is_named(tmp_path, saved_gpt2, saved_bert, case):
    change, message = WRONG[case]
    load, folder = (load_bert, saved_bert) if case.startswith("BERT") else (load_gpt2, saved_gpt2)
    with pytest.raises(ValueError, match=rf"^{load.__name__}: {tmp_path}.*{message}"):
        load(rewritten(folder, tmp_path, **change))


def test_missing_and_broken_files_are_named(tmp_path, saved_gpt2):
    """In the order that a user would mend them."""
    index, file, config = (tmp_path / n for n in ("model.safetensors.index.json", "model.safetensors", "config.json"))
    weights = (saved_gpt2 / "model.safetensors").read_bytes()
    outside = [{"wte.weight": "../model.safetensors"}, [], 3, None, {}, {"wte.weight": 1}, {"wte.weight": ["a"]}]
    steps = [
        (None, b"", FileNotFoundError, "must hold model.safetensors or model.safetensors.index.json"),
        (tmp_path / "pytorch_model.bin", b"", FileNotFoundError, "a pickle, which is not opened"),
        *(
            (index, json.dumps({"weight_map": names}).encode(), ValueError, "weight_map must name files of the folder")
            for names in outside
        ),
        (index, b'{"weight_map": {"a": "model-1.safetensors"}}', FileNotFoundError, "model-1.safetensors is missing"),
        (file, b"not one", ValueError, "model.safetensors must be a safetensors file"),
        (file, weights, FileNotFoundError, "config.json is missing"),
        (config, b"{", ValueError, "config.json must be JSON"),
    ]
    for path, content, kind, message in steps:
        if path is not None:
            path.write_bytes(content)
        with pytest.raises(kind, match=message):
            load_gpt2(tmp_path)


def test_without_safetensors_the_extra_is_named(saved_gpt2, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install 'primer-fast\[cli\]'"):
        load_gpt2(saved_gpt2)


def test_generates_what_transformers_generates(saved_gpt2):
    """Prompts of different lengths: padded on the left there, on the right here."""
    theirs, ours = transformers.GPT2LMHeadModel.from_pretrained(saved_gpt2).eval(), load_gpt2(saved_gpt2)
    torch.manual_seed(3)
    prompts = [torch.randint(1, 101, (n,)) for n in (3, 9, 1)]
    tokens, mask = torch.zeros(3, 9, dtype=torch.int64), torch.zeros(3, 9, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, 9 - len(prompt) :], mask[row, 9 - len(prompt) :] = prompt, 1
    settings = {"max_new_tokens": 15, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = theirs.generate(tokens, attention_mask=mask, **settings)[:, 9:]
    got = generate(ours, prompts, max_new_tokens=15, temperature=0)
    assert torch.equal(torch.stack(got.completions()), expected)
    assert len(expected.unique()) > 3
