"""What only a GPU's benchmark of attention calls."""

import pytest
import torch

from primer_fast.bench.ops import scaled_dot_product_attention as bench
from primer_fast.bench.peers import NotAvailable
from primer_fast.functional import attention_operator
from primer_fast.functional.scaled_dot_product_attention import scaled_dot_product_attention_plain


@pytest.mark.parametrize("causal", [True, False])
def test_the_one_pass_backward_agrees_with_eager(causal, device, monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    calls, launcher = [], attention_operator.attention_bwd_onepass
    monkeypatch.setattr(
        attention_operator, "attention_bwd_onepass", lambda *a, **o: calls.append(1) or launcher(*a, **o)
    )
    shapes = ((1, 2, 40, 16), (1, 1, 40, 16), (1, 1, 40, 16))
    qkv = [torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    options = {"is_causal": causal, "enable_gqa": True}
    ours, eager = bench.one_pass(*qkv, **options), scaled_dot_product_attention_plain(*qkv, **options)
    dy = torch.randn_like(eager)
    got, want = (torch.autograd.grad(y, qkv, dy) for y in (ours, eager))
    torch.testing.assert_close((ours, *got), (eager, *want), rtol=3e-2, atol=3e-2)
    assert calls == [1]
    with pytest.raises(NotAvailable, match="all keys or causal"):
        bench.one_pass(*qkv, window=3)
