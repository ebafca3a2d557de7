"""Every model under torch.compile(fullgraph=True) and torch.export: one graph, whatever the batch."""

import pytest
import torch
import torch.nn.functional as torch_F
from torch.export import Dim

from primer_fast import nn
from primer_fast.models.actor_critic import ActorCritic
from primer_fast.models.cnn import CNN, CNNConfig
from primer_fast.models.mlp import MLP, MLPConfig
from primer_fast.models.reward import RewardModel
from primer_fast.models.transformer import Transformer, TransformerConfig
from primer_fast.models.vit import ViT, ViTConfig


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()


def mlp():
    return MLP(MLPConfig((6, 5, 3), "gelu"))


def cnn():
    return CNN(CNNConfig((1, 8, 8), (2,), 3, 2, (4,), 3))


def vit():
    return ViT(ViTConfig((1, 4, 4), 2, 8, 1, 2, 16, 3))


def transformer(**options):
    return Transformer(TransformerConfig(vocab=11, context=8, width=8, layers=1, heads=2, mlp_width=16, **options))


def pre_norm():
    return transformer(norm="pre", positions="learned", kv_heads=1, dropout=0.1)


def bert():
    return transformer(
        causal=False, segments=2, embedding_norm=True, head_transform=True, head_bias=True, positions="learned"
    )


def tokens(B):
    return torch.randint(11, (B, B + 1))


def classify(model, x):
    return torch_F.cross_entropy(model(x), torch.arange(x.shape[0]) % 3)


def act(model, t):
    hidden, values = model(t)
    log_probs, entropy = model.policy.log_prob_of(hidden, t, return_entropy=True)
    return (log_probs * values + entropy).mean()


def attend_masked(model, x):  # (T, B, 8)
    padding = torch.zeros(x.shape[1], x.shape[0], dtype=torch.bool)
    causal = torch.ones(x.shape[0], x.shape[0], dtype=torch.bool).triu(1)
    y, weights = model(x, x, x, key_padding_mask=padding, attn_mask=causal)
    return y.square().mean() + weights.square().mean()


STEPS = {  # a model, a loss of it and a batch, and the batch of size B
    "mlp": (mlp, classify, lambda B: torch.randn(B, 6)),
    "cnn": (cnn, classify, lambda B: torch.randn(B, 8, 8)),
    "vit": (vit, classify, lambda B: torch.randn(B, 1, 4, 4)),
    "post-LN decoder": (transformer, lambda m, t: m.loss(t, t, mask=t > -1), tokens),
    "pre-LN decoder": (pre_norm, lambda m, t: m.loss(t, t), tokens),
    "encoder": (bert, lambda m, t: m(t, lengths=t[:, 0] % 2 + 2, segments=t % 2).square().mean(), tokens),
    "reward": (lambda: RewardModel(transformer().config), lambda m, t: m(t, t[:, 0] % 2 + 1).square().mean(), tokens),
    "actor and critic": (lambda: ActorCritic(transformer()), act, tokens),
    "multi-head attention": (
        lambda: nn.MultiheadAttention(8, 2, dropout=0.1), attend_masked, lambda B: torch.randn(B + 1, B, 8),
    ),
}  # fmt: skip


def trained(make, loss, batch, sizes, **options):
    """Losses and weights after a step of SGD for each batch; compiled with ``options``, the third with no new graph."""
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = torch.compile(loss, fullgraph=True, **options) if options else loss
    losses = []
    for i, size in enumerate(sizes):
        torch.manual_seed(size)
        optimizer.zero_grad()
        with torch.compiler.set_stance("fail_on_recompile" if i > 1 else "default"):
            value = step(model, batch(size))
            value.backward()
        optimizer.step()
        losses.append(value.detach())
    return losses, list(model.state_dict().values())


def same(got, want):
    for a, b in zip(got, want, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", STEPS)
def test_training_on_varying_batches_compiles_at_most_twice(name, plain_path):
    """As people call it: the second batch makes sizes dynamic, and no later one recompiles."""
    same(trained(*STEPS[name], (3, 4, 6), backend="aot_eager"), trained(*STEPS[name], (3, 4, 6)))


@pytest.mark.parametrize("name", ["mlp", "cnn", "pre-LN decoder"])
def test_training_through_the_kernels(name, device):
    if device != "cpu":
        pytest.skip("the batches are on a CPU")
    same(trained(*STEPS[name], (2,), backend="aot_eager"), trained(*STEPS[name], (2,)))


@pytest.mark.parametrize("path", ["kernels", "plain"])
def test_inductor_trains_an_mlp(path, request):
    if path == "plain":
        request.getfixturevalue("plain_path")
    elif torch.cuda.is_available():
        pytest.skip("the batches are on a CPU")
    got, want = (trained(*STEPS["mlp"], (3, 3), **options) for options in ({"backend": "inductor"}, {}))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


EXPORTED = {
    "mlp": (mlp, {0: Dim("batch")}),
    "cnn": (cnn, {0: Dim("batch")}),
    "vit": (vit, {0: Dim("batch")}),
    "post-LN decoder": (transformer, {0: Dim("batch"), 1: Dim("time", max=8)}),
    "pre-LN decoder": (pre_norm, {0: Dim("batch"), 1: Dim("time", max=8)}),
}


@pytest.mark.parametrize("path", ["kernels", "plain"])
@pytest.mark.parametrize("name", EXPORTED)
def test_export_for_inference(name, path, request):
    if path == "plain":
        request.getfixturevalue("plain_path")
    elif torch.cuda.is_available():
        pytest.skip("the batches are on a CPU")
    make, sizes = EXPORTED[name]
    model, batch = make().eval(), STEPS[name][2]
    with torch.no_grad():
        program = torch.export.export(model, (batch(3),), dynamic_shapes=(sizes,))
        operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert ("primer_fast.mlp.default" in operators) == (path == "kernels")
        for B in (2, 5):
            x = batch(B)
            assert torch.equal(program.module()(x), model(x))


@pytest.mark.parametrize("fixed", [False, True])
def test_the_cached_decoding_step_is_one_graph(fixed, plain_path):
    """From the second step on lengths are dynamic, and no step recompiles."""
    model = transformer().eval()

    def decode(step):
        torch.manual_seed(0)
        cache = model.new_cache(2, 8, fixed=fixed)
        hidden = [model.hidden(torch.randint(11, (2, 3)), lengths=torch.tensor([3, 2]), cache=cache)]
        for i in range(4):
            with torch.compiler.set_stance("fail_on_recompile" if i > 1 and step is not whole else "default"):
                hidden.append(step(torch.randint(11, (2, 1)), cache))
        return hidden

    def whole(token, cache):
        return model.hidden(token, cache=cache)

    with torch.no_grad():
        same([decode(torch.compile(whole, backend="aot_eager", fullgraph=True))], [decode(whole)])
