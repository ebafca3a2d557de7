"""replace_modules and attn_implementation="primer_fast" on models of transformers with small random weights."""

import copy
import os

import pytest
import torch
from parity import assert_as_before, both, padded, run, varied

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")

import primer_fast  # noqa: E402
from primer_fast.adopt import attention  # noqa: E402

TEXT = {"vocab_size": 61, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
LLAMA = TEXT | {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "max_position_embeddings": 32}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
BERT = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
GPT2 = TEXT | {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SLIDING = LLAMA | {"sliding_window": 4}
MODELS = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**BERT, max_position_embeddings=32)),
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(**VIT, image_size=16, patch_size=8, num_labels=7)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**SLIDING)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**SLIDING, query_pre_attn_scalar=16, attn_logit_softcapping=2.0)
    ),
}


def made(name, dtype=torch.float32, implementation="sdpa"):
    """In evaluation, since dropout draws other numbers."""
    torch.manual_seed(1)
    model = MODELS[name]().to(dtype).eval()
    model.set_attn_implementation(implementation)
    return varied(model, 0.1)


def replaced(name, **options):
    """The model replaced, as it was before, the report."""
    model = made(name, **options)
    before = copy.deepcopy(model)
    return model, before, primer_fast.replace_modules(model)


def texts(side, lengths=(9, 5, 2)):
    return padded(side, lengths, (1, 61))


def logits(tokens, mask=None):
    """-> what calls a model, for the logits of what is real"""

    def call(model):
        if mask is None:
            return model(input_ids=tokens).logits
        return model(input_ids=tokens, attention_mask=mask.long()).logits[mask]

    return call


@pytest.mark.parametrize(
    ("side", "dtype"),
    [("left", torch.float32), ("left", torch.bfloat16), ("right", torch.float32), ("none", torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("name", ["gpt2", "bert", "llama"])
def test_language_models(name, dtype, side, seen, plain_path):
    model, before, _ = replaced(name, dtype=dtype)
    tokens, mask = texts(side if side != "none" else "left")
    assert_as_before(model, before, logits(tokens, None if side == "none" else mask))
    heads = 2 if name == "llama" else 4
    assert seen == [(4, heads, side != "none")] * 2, "once for each layer, keys and values not repeated"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_vision_transformer(dtype, seen, plain_path):
    model, before, _ = replaced("vit", dtype=dtype)
    images = torch.randn(2, 3, 16, 16)
    assert_as_before(model, before, lambda m: m(pixel_values=images.to(m.dtype)).logits)
    assert seen == [(4, 4, False)] * 2


def assert_resnet_as_before(kind, x):
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 10}
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes, layer_type=kind))
    layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.preserve_format
    model, before, report = both(model.to(x.device, x.dtype, memory_format=layout))
    kinds = [s.before for s in report.swapped]
    assert kinds.count("Conv2d") == sum(isinstance(m, torch.nn.Conv2d) for m in before.modules())
    assert "MaxPool2d" in kinds and "Linear" in kinds
    reasons = {(p.kind, p.reason) for p in report.left}
    assert ("ReLU", "it follows BatchNorm2d") in reasons and ("BatchNorm2d", "no op of ours") in reasons
    assert_as_before(model, before, lambda m: m(pixel_values=x.to(m.dtype)).logits)


@pytest.mark.parametrize("kind, dtype", [("basic", torch.bfloat16), ("bottleneck", torch.float32)], ids=str)
def test_resnet(kind, dtype, plain_path):
    assert_resnet_as_before(kind, torch.randn(2, 3, 32, 32, dtype=dtype))


def test_resnet_on_the_kernels(device):
    x = torch.randn(1, 3, 16, 16, device=device)
    assert_resnet_as_before("basic", x.to(memory_format=torch.channels_last))


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit", "llama", "gpt2 in 16 bits"])
def test_on_the_kernels(name):
    name, *bits = name.split(" ", 1)
    model, before, _ = replaced(name, dtype=torch.bfloat16 if bits else torch.float32)
    tokens, mask = texts("left", (4, 2))
    if name == "vit":
        call = lambda m: m(pixel_values=torch.ones(1, 3, 16, 16, dtype=m.dtype)).logits  # noqa: E731
    else:
        call = logits(tokens, mask)
    assert_as_before(model, before, call)


@pytest.mark.parametrize(
    ("name", "cache"),
    [("gpt2", "padded"), ("gpt2", "static"), ("llama", "whole"), ("llama", "static"), ("mistral", "padded")],
)
def test_generated_tokens_are_the_same(name, cache, seen, plain_path):
    model, before, _ = replaced(name)
    tokens, mask = texts("left", (6, 6) if cache == "whole" else (6, 2))
    options = {"attention_mask": mask.long(), "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    options |= {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
    assert torch.equal(*(m.generate(tokens, **options) for m in (model, before)))
    assert len(seen) == 8 * 2
    if cache == "whole":
        assert not any(masked for *_, masked in seen), "neither the prompt nor a single token needs a mask"


@pytest.mark.parametrize("padding", [False, True])
def test_sliding_window(padding, plain_path):
    model, before, _ = replaced("mistral")
    tokens, mask = texts("left")
    call = logits(tokens, mask if padding else None)
    assert_as_before(model, before, call)
    before.config.sliding_window = None
    assert (call(model) - call(before)).abs().max() > 1e-2, "the window has an influence"


def test_softcap(plain_path):
    """transformers' sdpa cannot; its eager attention can, but not in float64."""
    before, model = made("gemma2", implementation="eager"), made("gemma2", implementation="eager")
    primer_fast.register_attention()
    model.set_attn_implementation("primer_fast")
    tokens, mask = texts("left")
    for call in (logits(tokens, mask), logits(tokens)):
        dy = torch.randn_like(call(before))
        (got, got_grads), (want, want_grads) = (run(m, call, dy) for m in (model, before))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        for name, grad in want_grads.items():
            torch.testing.assert_close(got_grads[name], grad, rtol=1e-3, atol=1e-3 * grad.abs().max().item())


def test_chosen_when_the_model_is_made(seen, plain_path):
    known = primer_fast.register_attention()
    assert "transformers" in known and primer_fast.register_attention() == known
    config = transformers.LlamaConfig(**LLAMA, attn_implementation="primer_fast")
    transformers.LlamaForCausalLM(config)(torch.ones(1, 3, dtype=torch.long))
    assert len(seen) == 2


def test_what_ours_cannot_goes_to_transformers(seen, plain_path):
    q, k, v = (torch.randn(2, heads, 5, 8, requires_grad=True) for heads in (4, 2, 2))
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    bias, mask = torch.randn(1, 4, 5, 5, requires_grad=True), torch.randn(1, 4, 5, 5, requires_grad=True)
    from transformers.integrations.sdpa_attention import sdpa_attention_forward as theirs

    def assert_theirs(*arguments, **options):
        got, want = (f(module, q, k, v, *arguments, **options)[0] for f in (attention.transformers_attention, theirs))
        torch.testing.assert_close(got, want)
        wanted = [t for t in (bias, mask) if any(t is a for a in options.values())]
        assert len(torch.autograd.grad(got, wanted, got) if wanted else ()) == len(wanted)

    assert_theirs(attention_mask=None, position_bias=bias)
    assert_theirs(attention_mask=mask)
    assert not seen
    assert_theirs(mask.detach(), 0.0, 0.3)
    assert len(seen) == 1
    with pytest.raises(NotImplementedError, match=r'attention sinks are not built; use attn_implementation="eager"'):
        attention.transformers_attention(module, q, k, v, None, s_aux=torch.zeros(4))


def test_report_of_gpt2():
    model, before, report = replaced("gpt2")
    swapped = {s.name: s for s in report.swapped}
    assert swapped[""].after == "attention: primer_fast" and model.config._attn_implementation == "primer_fast"
    assert swapped["transformer.h.1.mlp.c_fc"].activation == "gelu_tanh"
    assert {s.before for s in report.swapped} == {"attention: sdpa", "Conv1D", "Linear", "LayerNorm", "Embedding"}
    assert {p.kind for p in report.left} == {"Dropout"}
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.transformer.h[0].mlp.c_fc.weight.shape == (32, 128) and list(model.state_dict()) == list(
        before.state_dict()
    )
    again = primer_fast.replace_modules(model)
    assert again.swapped == () and again.left == report.left
    report.restore()
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert model.config._attn_implementation == "sdpa"


def test_report_of_the_others():
    def left(name):
        return {(p.kind, p.reason) for p in replaced(name)[2].left}

    assert ("LlamaRMSNorm", "no op of ours") in left("llama")
    assert {kind for kind, _ in left("bert")} == {kind for kind, _ in left("vit")} == {"Dropout"}
    fused = {s.name for s in replaced("bert")[2].swapped if s.activation == "gelu"}
    assert fused == {*(f"bert.encoder.layer.{i}.intermediate.dense" for i in (0, 1)), "cls.predictions.transform.dense"}


@pytest.mark.parametrize("options", [{"attention": False}, {"exclude": [""]}])
def test_attention_is_an_option(options):
    model = made("gpt2")
    report = primer_fast.replace_modules(model, **options)
    assert ("attention of GPT2LMHeadModel", "not asked for") in {(p.kind, p.reason) for p in report.left}
    assert model.config._attn_implementation == "sdpa"


def test_eager_attention_is_left_since_it_can_return_weights(plain_path):
    _, _, report = replaced("bert", implementation="eager")
    assert report.left[0].reason == "it is eager, and ours takes the place of sdpa"


def test_a_model_without_attention_is_said_nothing_of_attention():
    sizes = {"hidden_sizes": [4, 4], "depths": [1, 1]}
    resnet = transformers.ResNetModel(transformers.ResNetConfig(embedding_size=4, **sizes))
    convnext = transformers.ConvNextModel(transformers.ConvNextConfig(**sizes, num_stages=2))
    before, x = copy.deepcopy(convnext).eval(), torch.randn(1, 3, 32, 32)
    reports = [primer_fast.replace_modules(model) for model in (resnet, convnext)]
    assert not any("attention" in row.kind for report in reports for row in report.left)
    assert not any("LayerNorm" in row.kind for row in reports[1].left), "both orders of its axes are taken"
    assert "ModuleList" not in {row.kind for row in reports[1].left}, "one that is empty"
    torch.testing.assert_close(convnext.eval()(x).last_hidden_state, before(x).last_hidden_state)


def test_attention_that_cannot_be_chosen_is_said_to_be_the_models_own():
    model = transformers.RwkvModel(transformers.RwkvConfig(vocab_size=9, hidden_size=8, num_hidden_layers=2))
    rows = [row.reason for row in primer_fast.replace_modules(model).left if "attention" in row.kind]
    assert rows == ["the model has an attention of its own, and no other can be set"]


def test_a_model_inside_another(seen, plain_path):
    model = torch.nn.ModuleDict({"text": made("bert").bert, "head": torch.nn.Linear(32, 2)})
    report = primer_fast.replace_modules(model)
    assert report.swapped[0].name == "text" and report.swapped[0].before == "attention: sdpa"
    model["head"](model["text"](torch.ones(1, 3, dtype=torch.long)).last_hidden_state)
    assert len(seen) == 2


def test_saved_and_loaded_again(tmp_path, plain_path):
    model, before, _ = replaced("gpt2")
    model.save_pretrained(tmp_path)
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa", "the choice is not part of a checkpoint"
    tokens, mask = texts("left")
    torch.testing.assert_close(logits(tokens, mask)(loaded), logits(tokens, mask)(before))


def test_compiled_without_a_graph_break(plain_path):
    model, before, _ = replaced("llama")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tokens, _ = texts("left")
    torch.testing.assert_close(compiled(input_ids=tokens).logits, logits(tokens)(before), rtol=1e-4, atol=1e-5)
