"""torch.amp.GradScaler around a float16 step through the ops."""

import torch

from primer_fast import functional as F
from primer_fast import nn


class Everything(torch.nn.Module):
    """Tokens (N, 4) -> loss; every op takes part."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 16)
        self.attention = nn.MultiheadAttention(16, 1, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.conv = nn.Conv2d(1, 2, 3, padding=1, activation="relu")
        self.pool = nn.MaxPool2d(2)
        self.linear = nn.Linear(32, 16, activation="gelu")
        self.head = nn.Linear(16, 9)

    def forward(self, tokens, target):
        x = self.embedding(tokens)
        x = self.norm(x, self.attention(x, x, x, need_weights=False)[0])
        x = self.linear(self.pool(self.conv(x[:, None])).flatten(1))
        loss = F.linear_cross_entropy(x, self.head.weight, target, linear_bias=self.head.bias)
        return loss - 0.1 * F.linear_log_prob(x, self.head.weight, target, linear_bias=self.head.bias).mean()


def test_float16_step(place):
    """A step is made where the gradient is finite; where it is not, none is made and the scale is halved."""
    torch.manual_seed(0)
    model = Everything().to(place)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    scaler = torch.amp.GradScaler(place, init_scale=1024.0)
    tokens, target = torch.randint(0, 9, (2, 4), device=place), torch.randint(0, 9, (2,), device=place)
    losses = []
    for overflow in (False, True, False):
        before = [p.detach().clone() for p in model.parameters()]
        scale = scaler.get_scale()
        optimizer.zero_grad()
        with torch.autocast(place, torch.float16):
            loss = model(tokens, target)
        scaler.scale(loss * (1e30 if overflow else 1)).backward()
        assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
        scaler.step(optimizer)
        scaler.update()
        same = [torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
        assert all(same) if overflow else not any(same)
        assert scaler.get_scale() == (scale / 2 if overflow else scale)
        losses.append(loss.item())
    assert losses[-1] < losses[0]
