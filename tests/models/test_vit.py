import math

import pytest
import torch
import torch.nn.functional as torch_F
from parity import varied

from primer_fast.models.vit import ViT, ViTConfig

SMALL = {"image": (3, 8, 12), "patch": 4, "width": 12, "layers": 2, "heads": 3, "classes": 5}


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
    torch.manual_seed(0)
    model = varied(ViT(ViTConfig(**SMALL, pool=pool)), 0.3).to(device).eval()
    x = torch.randn(4, 3, 8, 12, device=device)
    got = model(x)
    torch.testing.assert_close(got.double(), formula(model, x), rtol=1e-4, atol=1e-4)
    assert got.shape == (4, 5) and got.std() > 0.3


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
