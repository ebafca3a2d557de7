"""What every model is held to: kernels, copies, gradients, names of what is wrong; one graph, whatever the batch."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as torch_F
from parity import varied
from torch.export import Dim

from primer_fast import backend, nn
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


def vit(**options):
    return ViT(ViTConfig((1, 4, 4), 2, 8, 1, 2, 16, 3, **options))


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
    return torch_F.cross_entropy(model(x), torch.arange(x.shape[0], device=x.device) % 3)


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
    "post-LN decoder": (transformer, lambda m, t: m.loss(t, t), tokens),
    "pre-LN decoder": (pre_norm, lambda m, t: m.loss(t, t, mask=t > -1), tokens),
    "encoder": (bert, lambda m, t: m(t, lengths=t[:, 0] % 2 + 2, segments=t % 2).square().mean(), tokens),
    "reward": (lambda: RewardModel(transformer().config), lambda m, t: m(t, t[:, 0] % 2 + 1).square().mean(), tokens),
    "actor and critic": (lambda: ActorCritic(transformer()), act, tokens),
    "multi-head attention": (
        lambda: nn.MultiheadAttention(8, 2, dropout=0.1), attend_masked, lambda B: torch.randn(B + 1, B, 8),
    ),
}  # fmt: skip


def randomised(name):
    torch.manual_seed(0)
    return varied(STEPS[name][0](), 0.3).eval()


@pytest.mark.parametrize("name", ["mlp", "cnn", "vit", "post-LN decoder", "pre-LN decoder", "encoder"])
def test_the_kernels_compute_forward_and_backward(name, device):
    """In the interpreter, or on the GPU; against the plain path in float64."""
    _, loss, batch = STEPS[name]
    model, x = randomised(name).to(device), batch(2).to(device)
    exact, wide = copy.deepcopy(model).double(), x.double() if x.is_floating_point() else x
    assert backend.runs_triton(next(model.parameters())) and not backend.runs_triton(next(exact.parameters()))
    got, want = loss(model, x), loss(exact, wide)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    got.backward()
    want.backward()
    for (name, ours), theirs in zip(model.named_parameters(), exact.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", STEPS)
def test_copies_pickles_and_loaded_weights_agree(name, plain_path):
    make, loss, batch = STEPS[name]
    model, x, file = randomised(name), batch(3), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = make().eval()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(loss(other, x), loss(model, x))


@pytest.mark.parametrize("name", STEPS)
def test_every_parameter_that_is_trained_has_a_gradient(name, plain_path):
    _, loss, batch = STEPS[name]
    model = randomised(name)
    loss(model, batch(7)).backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None and p.grad.abs().max() > 1e-6) == p.requires_grad, name


@pytest.mark.parametrize(
    ("make", "batch"),
    [(transformer, tokens), (lambda **o: transformer(norm="pre", **o), tokens), (vit, STEPS["vit"][2])],
    ids=["post", "pre", "vit"],
)
def test_dropout_in_training_alone(make, batch, plain_path):
    model, without, x = make(dropout=0.5), make(), batch(4)
    for p in model.parameters():
        torch.nn.init.normal_(p)
    without.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(x), without.eval()(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    first, second = (torch.random.manual_seed(5) and model(x) for _ in "ab")
    assert torch.equal(first, second)


@pytest.mark.parametrize("model", [CNN(CNNConfig((1, 9, 8), (3,), 3)), vit()], ids=["cnn", "vit"])
def test_one_channel_may_be_left_out(model, plain_path):
    x = torch.randn(4, *model.config.image[1:])
    assert torch.equal(model(x), model(x[:, None]))
    assert torch.equal(model(x), model(x.transpose(1, 2).contiguous().transpose(1, 2)))
    assert model(x[:0]).shape == (0, model.config.classes)


SMALL = {
    MLPConfig: {},
    CNNConfig: {},
    ViTConfig: {"image": (3, 8, 12), "patch": 4, "width": 12, "layers": 2, "heads": 3, "classes": 5},
    TransformerConfig: {"vocab": 13, "context": 11, "width": 12, "layers": 2, "heads": 3},
}
SIZES = "sizes must be two or more positive integers"
WRONG = [  # settings, and what is said of them
    *((MLPConfig, {"sizes": sizes}, SIZES) for sizes in [(), (3,), (3, 0), (3, -1, 2), (3, 2.0), (3, "4"), (True, 2)]),
    (MLPConfig, {"activation": "swoosh"}, "activation must be .*relu.*; got 'swoosh'"),
    (MLPConfig, {"output_activation": "swoosh"}, "activation must be .*relu.*; got 'swoosh'"),
    (CNNConfig, {"image": (28, 28)}, r"image must be channels, height and width; got \[28, 28\]"),
    (CNNConfig, {"image": (1, 0, 28)}, r"image must be positive integers; got \[1, 0, 28\]"),
    (CNNConfig, {"channels": ()}, r"channels must name at least one convolution; got \[\]"),
    (CNNConfig, {"channels": (3, -1)}, r"channels must be positive integers; got \[3, -1\]"),
    (CNNConfig, {"hidden": (2.5,)}, r"hidden must be positive integers; got \[2.5\]"),
    (CNNConfig, {"kernel_size": 0}, "kernel_size must be a positive integer; got 0"),
    (CNNConfig, {"pool": (2, 2)}, r"pool must be a positive integer; got \(2, 2\)"),
    (CNNConfig, {"classes": True}, "classes must be a positive integer; got True"),
    (CNNConfig, {"activation": "swoosh"}, "activation must be None or one of relu.*; got 'swoosh'"),
    (CNNConfig, {"image": (1, 4, 28)}, r".*conv1 would leave none.* 5 x 5 does not fit into 4 x 28 \(image 1 x 4 x 28"),
    (CNNConfig, {"image": (1, 5, 5)}, ".*pool1 would leave none.* 2 x 2 does not fit into 1 x 1"),
    (CNNConfig, {"image": (3, 28, 12)}, ".*conv2 would leave none.* 5 x 5 does not fit into 12 x 4"),
    (CNNConfig, {"image": (1, 28, 14)}, ".*pool2 would leave none.* 2 x 2 does not fit into 8 x 1"),
    (ViTConfig, {"image": (8, 8)}, r"image must be channels, height and width; got \[8, 8\]"),
    (ViTConfig, {"patch": 5}, r"patch must divide height and width; got 5 and \[8, 12\]"),
    (ViTConfig, {"classes": 0}, "classes must be a positive integer; got 0"),
    (ViTConfig, {"pool": "max"}, "pool must be one of class, mean; got 'max'"),
    (ViTConfig, {"activation": None}, "activation must be one of gelu, gelu_tanh, relu; got None"),
    (TransformerConfig, {"vocab": 0}, "vocab must be a positive integer; got 0"),
    (TransformerConfig, {"heads": 5}, "heads must divide width; got 5 and 12"),
    (TransformerConfig, {"kv_heads": 2}, "kv_heads must divide heads; got 2 and 3"),
    (TransformerConfig, {"width": 9}, "width must be even for sinusoidal positions; got 9"),
    (TransformerConfig, {"activation": "tanh"}, "activation must be one of gelu, gelu_tanh, relu; got 'tanh'"),
    (TransformerConfig, {"norm": "both"}, "norm must be one of post, pre; got 'both'"),
    (TransformerConfig, {"positions": None}, "positions must be one of sinusoidal, learned; got None"),
    (TransformerConfig, {"dropout": 1.0}, r"dropout must be in \[0, 1\); got 1.0"),
    (TransformerConfig, {"segments": -1}, "segments must be an integer of 0 or more; got -1"),
    (TransformerConfig, {"mlp_width": 1.5}, "mlp_width must be a positive integer; got 1.5"),
]


@pytest.mark.parametrize(("config", "options", "message"), WRONG, ids=lambda x: str(x)[:40])
def test_wrong_configuration_is_named(config, options, message):
    with pytest.raises(ValueError, match=f"^{config.__name__.removesuffix('Config')}: {message}"):
        config(**SMALL[config] | options)


OF_IMAGES = [(2, 11, 10), (2, 3, 10, 11), (3, 11, 10), (2, 1, 11, 10), (2, 330), (), (3,)]
UNFIT = {
    "mlp": (lambda: MLP(MLPConfig((12, 5))), [(3, 11), (12,), (), (3, 12, 2), (3,)], r"MLP: input must be \(B, 12\) "),
    "cnn": (lambda: CNN(CNNConfig((3, 11, 10), (4,), 3)), OF_IMAGES, r"CNN: input must be \(B, 3, 11, 10\); got "),
    "cnn, one channel": (
        lambda: CNN(CNNConfig()), [(28, 28)], r"CNN: input must be \(B, 1, 28, 28\) or \(B, 28, 28\); got \(28, 28\)"
    ),
    "vit": (lambda: ViT(ViTConfig((3, 11, 10), 1)), OF_IMAGES, r"ViT: input must be \(B, 3, 11, 10\); got "),
    "transformer": (transformer, [(5,), (1, 2, 3)], r"Transformer: tokens must be \(B, T\); got "),
    "a long text": (transformer, [(1, 9)], "Transformer: at most 8 tokens fit the context; got 9"),
}  # fmt: skip


@pytest.mark.parametrize("what", UNFIT)
def test_wrong_input_is_named(what, plain_path):
    make, shapes, message = UNFIT[what]
    model = make()
    for shape in shapes:
        with pytest.raises(ValueError, match=message):
            model(torch.zeros(shape, dtype=torch.int64 if isinstance(model, Transformer) else torch.float32))


# One graph


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


EXPORTED = {
    "mlp": (mlp, {0: Dim("batch")}),
    "cnn": (cnn, {0: Dim("batch")}),
    "vit": (vit, {0: Dim("batch")}),
    "post-LN decoder": (transformer, {0: Dim("batch"), 1: Dim("time", max=8)}),
    "pre-LN decoder": (pre_norm, {0: Dim("batch"), 1: Dim("time", max=8)}),
}


@pytest.mark.parametrize("name", [name for name in STEPS if name not in EXPORTED or name == "pre-LN decoder"])
def test_training_on_varying_batches_compiles_at_most_twice(name, plain_path):
    """As people call it: the second batch makes sizes dynamic, and no later one recompiles.

    Exporting the others shows that their graphs are whole and depend on no batch size.
    """
    same(trained(*STEPS[name], (3, 4, 6), backend="aot_eager"), trained(*STEPS[name], (3, 4, 6)))


def test_training_through_the_kernels(device):
    """Some of the models: tests/operators shows it of every op."""
    if device != "cpu":
        pytest.skip("the batches are on a CPU")
    case = STEPS["pre-LN decoder"]
    same(trained(*case, (2,), backend="aot_eager"), trained(*case, (2,)))


def test_inductor_trains_an_mlp(device):
    if device != "cpu":
        pytest.skip("the batches are on a CPU")
    got, want = (trained(*STEPS["mlp"], (3, 3), **options) for options in ({"backend": "inductor"}, {}))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


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
        program = torch.export.export(model, (batch(3),), dynamic_shapes=(sizes,), strict=path == "plain")
        operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert ("primer_fast.mlp.default" in operators) == (path == "kernels")
        x = batch(5)
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
