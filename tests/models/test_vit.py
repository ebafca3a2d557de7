import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as torch_F

from primer_fast import backend
from primer_fast.models.vit import ViT, ViTConfig

SMALL = {"image": (3, 8, 12), "patch": 4, "width": 12, "layers": 2, "heads": 3, "classes": 5}


def randomised(config, device="cpu"):
    torch.manual_seed(0)
    model = ViT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return model.to(device).eval()


def formula(model, x):
    """The logits by torch's own layers; patches by a convolution with stride p."""
    config = model.config
    w = dict(model.double().named_parameters())
    channels, p, W = config.image[0], config.patch, config.width

    def linear(x, name):
        return torch_F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x, name):
        return torch_F.layer_norm(x, (W,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    kernel = w["patches.weight"].view(W, channels, p, p)
    h = torch_F.conv2d(x.double(), kernel, w["patches.bias"], stride=p).flatten(2).transpose(1, 2)
    if config.pool == "class":
        h = torch.cat((w["class_token"].expand(len(h), 1, W), h), dim=1)
    h = h + w["positions"]
    for i in range(config.layers):
        y = norm(h, f"blocks.{i}.attention_norm")
        q, k, v = linear(y, f"blocks.{i}.attention.qkv").view(*h.shape[:2], 3, config.heads, -1).permute(2, 0, 3, 1, 4)
        y = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
        h = h + linear(y.transpose(1, 2).flatten(2), f"blocks.{i}.attention.out")
        y = linear(norm(h, f"blocks.{i}.mlp_norm"), f"blocks.{i}.up")
        h = h + linear(torch_F.gelu(y), f"blocks.{i}.down")
    h = norm(h, "norm")
    return linear(h[:, 0] if config.pool == "class" else h.mean(1), "head")


@pytest.mark.parametrize("pool", ["class", "mean"])
def test_logits_are_the_formula(plain_path, device, pool):
    model = randomised(ViTConfig(**SMALL, pool=pool), device)
    x = torch.randn(4, 3, 8, 12, device=device)
    got = model(x)
    torch.testing.assert_close(got.double(), formula(model, x), rtol=1e-4, atol=1e-4)
    assert got.shape == (4, 5) and got.std() > 0.3


def test_the_kernels_compute_forward_and_backward(device):
    """In the interpreter, or on the GPU; against the plain path in float64."""
    model = randomised(ViTConfig(**SMALL | {"layers": 1}), device)
    x, target = torch.randn(2, 3, 8, 12, device=device), torch.tensor([3, 1], device=device)
    assert backend.runs_triton(x)
    exact = copy.deepcopy(model).double()
    for m, inputs in ((model, x), (exact, x.double())):
        torch_F.cross_entropy(m(inputs), target).backward()
    for (name, ours), theirs in zip(model.named_parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-5, msg=name)
        assert ours.grad.abs().max() > 1e-6, name


def test_one_channel_may_be_left_out_and_copies_agree(plain_path):
    model = randomised(ViTConfig(image=[1, 8, 8], patch=4, width=8, layers=1, heads=2, dropout=0.2))
    x = torch.randn(3, 8, 8)
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(model(x), other(x[:, None]))
    assert model.train() and not torch.equal(model(x), model(x))


def test_first_loss_is_a_guess_and_training_lowers_it(plain_path):
    """Where in the image a bright patch is: positions and attention must work together."""
    torch.manual_seed(0)
    model = ViT(ViTConfig(image=(1, 8, 8), patch=4, width=32, layers=2, heads=2, classes=4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(150):
        x, target = torch.randn(32, 2, 4, 2, 4), torch.randint(4, (32,))
        x[torch.arange(32), target // 2, :, target % 2] += 1
        loss = torch_F.cross_entropy(model(x.reshape(32, 8, 8)), target)
        if step == 0:
            assert loss.item() == pytest.approx(math.log(4), abs=1e-6)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5


WRONG = {
    "image": ({"image": (8, 8)}, r"image must be channels, height and width; got \[8, 8\]"),
    "patch": ({"patch": 5}, r"patch must divide height and width; got 5 and \[8, 12\]"),
    "classes": ({"classes": 0}, "classes must be a positive integer; got 0"),
    "pool": ({"pool": "max"}, "pool must be one of class, mean; got 'max'"),
    "activation": ({"activation": None}, "activation must be one of gelu, gelu_tanh, relu; got None"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_configuration_is_named(case):
    options, message = WRONG[case]
    with pytest.raises(ValueError, match=f"^ViT: {message}"):
        ViTConfig(**SMALL | options)


@pytest.mark.parametrize("shape", [(2, 8, 12), (2, 3, 12, 8), (3, 8, 12), (2, 1, 8, 12)], ids=str)
def test_wrong_input_is_named(plain_path, shape):
    with pytest.raises(ValueError, match=r"ViT: input must be \(B, 3, 8, 12\); got "):
        ViT(ViTConfig(**SMALL))(torch.randn(shape))
