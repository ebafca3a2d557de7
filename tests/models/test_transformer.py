import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as torch_F
from parity import varied

from primer_fast import backend
from primer_fast.models.transformer import Transformer, TransformerConfig, sinusoids
from primer_fast.proof.numerics import exact
from primer_fast.reference.layer_norm import layer_norm
from primer_fast.reference.linear import linear
from primer_fast.reference.scaled_dot_product_attention import scaled_dot_product_attention

SMALL = {"vocab": 13, "context": 11, "width": 12, "layers": 2, "heads": 3}


def randomised(config, device="cpu"):
    """Logits are of size 1."""
    torch.manual_seed(0)
    return varied(Transformer(config), 0.3).to(device).eval()


def formula(model, tokens, mask=None, segments=None):
    """Hidden states and logits in float64, by the references of the ops."""
    config, (B, T) = model.config, tokens.shape
    w = {name: exact(t) for name, t in model.state_dict().items()} | {"positions": exact(model.positions)}
    real = np.ones((B, T), dtype=bool) if mask is None else mask.cpu().numpy()

    def dense(x, name, activation=None):
        return linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"), activation=activation)

    def norm(x, name):
        return layer_norm(x, config.width, w[f"{name}.weight"], w.get(f"{name}.bias"), config.norm_eps)

    def attention(x, name):
        heads = dense(x, f"{name}.qkv").reshape(B, T, -1, config.head_width).swapaxes(1, 2)
        q, k, v = np.split(heads, (config.heads, config.heads + config.key_heads), axis=1)
        y = scaled_dot_product_attention(q, k, v, real[:, None, None], is_causal=config.causal)
        return dense(y.swapaxes(1, 2).reshape(B, T, -1), f"{name}.out")

    def perceptron(x, name):
        return dense(dense(x, f"{name}.up", config.activation), f"{name}.down")

    places = np.maximum(real.cumsum(1) - 1, 0) if mask is not None and config.causal else np.arange(T)
    x = w["embedding.weight"][tokens.cpu()] + w["positions"][places]
    if config.segments:
        x = x + w["segments.weight"][np.zeros((B, T), dtype=int) if segments is None else segments.cpu()]
    if config.embedding_norm:
        x = norm(x, "embedding_norm")
    for name in (f"blocks.{i}" for i in range(config.layers)):
        if config.norm == "post":
            x = norm(attention(x, f"{name}.attention") + x, f"{name}.attention_norm")
            x = norm(perceptron(x, name) + x, f"{name}.mlp_norm")
        else:
            x = x + attention(norm(x, f"{name}.attention_norm"), f"{name}.attention")
            x = x + perceptron(norm(x, f"{name}.mlp_norm"), name)
    hidden = norm(x, "norm") if config.norm == "pre" else x
    features = norm(dense(hidden, "head", config.activation), "head_norm") if config.head_transform else hidden
    unembedding = w["embedding.weight" if config.tied else "unembedding.weight"]
    return hidden, features @ unembedding.T + w.get("head_bias", 0)


CONFIGS = {
    "the primer's block": {},
    "GPT-2's": {"norm": "pre", "positions": "learned", "activation": "gelu_tanh"},
    "an encoder": {"causal": False, "positions": "learned", "activation": "relu"},
    "BERT's": {"causal": False, "positions": "learned", "segments": 2, "embedding_norm": True, "head_transform": True,
               "head_bias": True, "norm_eps": 1e-12},
    "grouped heads": {"heads": 6, "kv_heads": 2, "norm": "pre"},
    "one key head, narrow perceptron, untied": {"kv_heads": 1, "mlp_width": 5, "tied": False},
    "without biases": {"bias": False, "norm": "pre", "head_bias": True},
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_hidden_states_and_logits_are_the_formula(plain_path, device, name):
    config = TransformerConfig(**SMALL | CONFIGS[name])
    model = randomised(config, device)
    tokens = torch.randint(13, (3, 9), device=device)
    segments = torch.randint(2, (3, 9), device=device) if config.segments else None
    hidden, logits = formula(model, tokens, segments=segments)
    options = {} if segments is None else {"segments": segments}
    np.testing.assert_allclose(exact(model.hidden(tokens, **options)), hidden, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(exact(model(tokens, **options)), logits, rtol=1e-4, atol=1e-4)
    assert logits.std() > 0.3


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("name", ["the primer's block", "GPT-2's", "an encoder", "BERT's"])
def test_padding_takes_no_part(plain_path, device, name, side):
    model = randomised(TransformerConfig(**SMALL | CONFIGS[name]), device)
    tokens = torch.randint(13, (3, 9), device=device)
    mask = torch.ones(3, 9, dtype=torch.bool, device=device)
    for row, n in ((1, 4), (2, 2)):
        mask[row, : n if side != "right" else 0] = False
        mask[row, 9 - n if side != "left" else 9 :] = False
    real = mask.cpu().numpy()
    expected, _ = formula(model, tokens, mask)
    np.testing.assert_allclose(exact(model.hidden(tokens, mask=mask))[real], expected[real], rtol=1e-4, atol=1e-4)
    other = torch.where(mask, tokens, (tokens + 1) % 13)
    assert torch.equal(model.hidden(other, mask=mask)[mask], model.hidden(tokens, mask=mask)[mask])
    if side == "right":
        lengths = mask.sum(1)
        got = exact(model.hidden(tokens, lengths=lengths))
        np.testing.assert_allclose(got[real], expected[real], rtol=1e-4, atol=1e-4)
        alone = exact(model.hidden(tokens[2:, : lengths[2]]))
        np.testing.assert_allclose(got[2, : lengths[2]], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_log_prob_are_those_of_the_logits(plain_path, device, name):
    model = randomised(TransformerConfig(**SMALL | CONFIGS[name]), device)
    tokens, targets = torch.randint(13, (2, 3, 7), device=device)
    logits = model(tokens)
    flat = logits.flatten(0, 1)
    targets_with_gaps = targets.clone()
    targets_with_gaps[0, :3] = -100
    for reduction in ("mean", "sum", "none"):
        expected = torch_F.cross_entropy(flat, targets_with_gaps.flatten(), reduction=reduction)
        got = model.loss(tokens, targets_with_gaps, reduction=reduction)
        torch.testing.assert_close(got, expected.view(got.shape), rtol=1e-5, atol=1e-5)
    assert model.loss(tokens, targets, ignore_index=int(targets[0, 0])) != model.loss(tokens, targets)
    log_probs = (logits / 0.7).log_softmax(-1)
    chosen, entropy = model.log_prob(tokens, targets, temperature=0.7, return_entropy=True)
    torch.testing.assert_close(chosen, log_probs.gather(-1, targets[..., None])[..., 0])
    torch.testing.assert_close(entropy, -(log_probs.exp() * log_probs).sum(-1))
    assert chosen.dtype == torch.float32 and torch.equal(chosen, model.log_prob(tokens, targets, temperature=0.7))


def test_the_loss_of_a_16_bit_model_is_float32(plain_path):
    for dtype, want in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        model = randomised(TransformerConfig(**SMALL)).to(dtype)
        loss = model.loss(*torch.randint(13, (2, 3, 7)))
        loss.backward()
        assert loss.dtype == want and model.embedding.weight.grad.dtype == dtype


def test_a_decoder_sees_no_later_token_and_an_encoder_does(plain_path):
    tokens = torch.randint(13, (1, 9))
    later = tokens.clone()
    later[0, 6] = (later[0, 6] + 1) % 13
    for causal in (True, False):
        model = randomised(TransformerConfig(**SMALL, causal=causal))
        same = (model(tokens) == model(later)).all(-1)[0]
        assert same[:6].all() == causal and not same[6]


def test_sinusoids():
    table = sinusoids(50, 8)
    assert table.shape == (50, 8) and table.dtype == torch.float32
    for t in (0, 1, 7, 49):
        for i in range(4):
            angle = t / 10000 ** (2 * i / 8)
            assert table[t, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[t, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)
    assert "positions" not in Transformer(TransformerConfig(**SMALL)).state_dict(), "they are not trained"


def test_first_weights_have_the_variance_of_the_source(plain_path):
    torch.manual_seed(0)
    sizes = {"vocab": 500, "context": 100, "width": 128, "layers": 8, "heads": 4}
    pre = Transformer(TransformerConfig(**sizes, norm="pre", positions="learned"))
    for name, p in pre.named_parameters():
        if p.dim() == 2:
            added = name.endswith(("out.weight", "down.weight"))
            want = 0.02 * 6**0.5 if name.startswith("blocks") else 0.02  # 6: 768, GPT-2's width, over 128
            assert p.std().item() == pytest.approx(want / 4 if added else want, rel=0.03), name
    post = Transformer(TransformerConfig(**sizes))
    for name, p in post.named_parameters():
        if name == "embedding.weight":
            assert p.std().item() == pytest.approx(128**-0.5, rel=0.03)
        elif name.endswith("qkv.weight"):  # three matrices (128, 128)
            assert p.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.03)
        elif p.dim() == 2:
            assert p.std().item() == pytest.approx((2 / sum(p.shape)) ** 0.5, rel=0.03), name
    for model in (pre, post):
        for name, p in model.named_parameters():
            if p.dim() == 1:
                assert (p == (0 if name.endswith("bias") else 1)).all(), name
        loss = model.loss(*torch.randint(500, (2, 4, 100)))
        assert loss.item() == pytest.approx(math.log(500), abs=1)
    assert torch.allclose(post.positions, sinusoids(100, 128) * 128**-0.5)


def test_attention_weights(plain_path):
    tokens = torch.randint(13, (2, 9))
    for name in ("the primer's block", "GPT-2's", "an encoder", "grouped heads"):
        model = randomised(TransformerConfig(**SMALL | CONFIGS[name]))
        weights = model.attention_weights(tokens)
        assert [tuple(w.shape) for w in weights] == [(2, model.config.heads, 9, 9)] * 2
        torch.testing.assert_close(weights[0].sum(-1), torch.ones(2, model.config.heads, 9))
        assert (weights[1].triu(1).abs().max() == 0) == model.config.causal
        seen, attention = [], model.blocks[1].attention
        attention.register_forward_hook(lambda module, args, output, seen=seen: seen.extend((*args, output)))
        model(tokens)
        value = attention.qkv(seen[0]).view(2, 9, -1, model.config.head_width)[:, :, -model.config.key_heads :]
        value = value.transpose(1, 2).repeat_interleave(model.config.heads // model.config.key_heads, 1)
        expected = attention.out((weights[1] @ value).transpose(1, 2).flatten(2))
        torch.testing.assert_close(seen[-1], expected, rtol=1e-4, atol=1e-4)


def test_attention_weights_of_padding_are_zero(plain_path):
    model = randomised(TransformerConfig(**SMALL, causal=False))
    tokens, lengths = torch.randint(13, (2, 9)), torch.tensor([9, 4])
    mask = torch.arange(9) < lengths[:, None]
    for weights in (model.attention_weights(tokens, lengths=lengths), model.attention_weights(tokens, mask=mask)):
        assert weights[0][1, :, :, 4:].abs().max() == 0 and weights[0][1, :, :, :4].min() > 0
    assert (model.attention_weights(tokens, mask=torch.zeros_like(mask))[0] == 0).all()


def test_learns_to_repeat(plain_path):
    """Tokens that were seen 5 positions before: only attention to that position can tell them."""
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(vocab=8, context=10, width=32, layers=2, heads=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(300):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * min(1, (step + 1) / 50)
        half = torch.randint(8, (64, 5))
        text = torch.cat((half, half), dim=1)
        loss = model.loss(text[:, :-1], torch.where(torch.arange(1, 10) >= 5, text[:, 1:], -100))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1  # a guess costs ln 8 = 2.1


def test_a_wrong_mask_is_named(plain_path):
    model, tokens = Transformer(TransformerConfig(**SMALL)), torch.randint(13, (2, 5))
    with pytest.raises(ValueError, match=r"mask must be bool \(2, 5\); got torch.int64 \(2, 5\)"):
        model(tokens, mask=torch.ones_like(tokens))
    with pytest.raises(ValueError, match=r"mask must be bool \(2, 5\); got torch.bool \(5,\)"):
        model(tokens, mask=torch.ones(5, dtype=torch.bool))


# Ids that stand for no token

NO_TOKEN = torch.tensor([2, 11, 12])


@pytest.mark.parametrize(
    ("path", "options"),
    [("kernels", {}), ("plain", {}), ("plain", {"tied": False, "head_bias": True})],
    ids=["kernels", "plain", "head bias"],
)
def test_what_is_excluded_has_probability_0(path, options, device, monkeypatch):
    """Losses, log-probabilities, entropies and their gradients are those of the softmax over the other ids."""
    if path == "plain":
        monkeypatch.setattr(backend, "stand_in", None)
    model = randomised(TransformerConfig(**SMALL, **options), device)
    shape = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    model.exclude(NO_TOKEN)
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == shape
    kept = torch.tensor([i for i in range(13) if i not in NO_TOKEN], device=device)
    tokens = kept[torch.randint(len(kept), (2, 7))]
    hidden = model.hidden(tokens[:, :-1]).detach().requires_grad_()
    weight, bias = model._unembedding(), model.head_bias

    wide = hidden.detach().double().requires_grad_()
    z = wide @ weight.detach().double()[kept].T + (0 if bias is None else bias.detach().double()[kept])
    place = torch.searchsorted(kept, tokens[:, 1:].contiguous())
    want = (z / 0.7).log_softmax(-1)
    want_log_prob = want.gather(-1, place[..., None])[..., 0]

    log_prob, entropy = model.log_prob_of(hidden, tokens[:, 1:], temperature=0.7, return_entropy=True)
    torch.testing.assert_close(log_prob.double(), want_log_prob, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(entropy.double(), -(want.exp() * want).sum(-1), atol=2e-5, rtol=1e-5)
    upstream = torch.randn(2, 6, device=device)
    gradient, of_weight = torch.autograd.grad(log_prob, (hidden, weight), upstream, retain_graph=True)
    torch.testing.assert_close(
        gradient.double(), torch.autograd.grad(want_log_prob, wide, upstream.double(), retain_graph=True)[0],
        atol=2e-5, rtol=1e-5,
    )  # fmt: skip
    assert of_weight[NO_TOKEN.to(device)].abs().max() == 0
    loss = model.loss(tokens[:, :-1], tokens[:, 1:])
    mean = -z.log_softmax(-1).gather(-1, place[..., None]).mean()
    torch.testing.assert_close(loss.double(), mean, atol=1e-5, rtol=1e-5)
    logits = model.logits(hidden)
    assert logits[..., NO_TOKEN.to(device)].isneginf().all() and logits[..., kept].isfinite().all()


def test_excluding_is_part_of_copies_and_can_be_undone(plain_path):
    model = randomised(TransformerConfig(**SMALL))
    tokens = torch.randint(13, (1, 4))
    before = model(tokens)
    model.exclude(NO_TOKEN)
    assert copy.deepcopy(model)(tokens)[..., NO_TOKEN].isneginf().all()
    with pytest.raises(ValueError, match="label_smoothing must be 0 where ids are excluded"):
        model.loss(tokens, tokens * 0, label_smoothing=0.1)
    assert model.bfloat16()(tokens)[..., NO_TOKEN].isneginf().all()
    model.float().exclude(torch.tensor([], dtype=torch.int64))
    assert model(tokens).isfinite().all() and model(tokens).shape == before.shape
    for ids, message in (([3, 13], r"ids must be in \[0, 13\); got 3 to 13"), ([-1], ".* got -1 to -1")):
        with pytest.raises(ValueError, match=f"exclude: {message}"):
            model.exclude(torch.tensor(ids))
    with pytest.raises(ValueError, match="exclude: one of the 13 ids must be left; got all of them"):
        model.exclude(torch.arange(13))
