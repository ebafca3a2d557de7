"""What tests/test_sharded.py holds two processes to: every op and small models on DTensors, against one process.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... [TRITON_INTERPRET=1] python sharded_cases.py FOLDER
Each process writes what it finds to FOLDER/RANK.json: name -> the largest difference, or what was raised.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from primer_fast import backend, replace_modules
from primer_fast import functional as F

R, S0, S1, S2 = Replicate(), Shard(0), Shard(1), Shard(2)


def ids(*shape):
    return torch.arange(torch.Size(shape).numel()).view(shape) * 5 % 11


def drawn(*shapes):
    generator = torch.Generator().manual_seed(3)
    return [s if isinstance(s, torch.Tensor) else torch.randn(s, generator=generator) for s in shapes]


LINEAR, MLP = [(3, 4, 8), (6, 8), (6,)], [(5, 8), (6, 8), (6,), (4, 6), (4,)]
HEADS, SAMPLES = [(1, 4, 3, 4), *[(1, 2, 5, 4)] * 2], [(2, 1, 5, 4), *[(2, 1, 6, 4)] * 2]
CASES = {  # a function, its tensors, and how they lie
    "linear, columns, gelu": (lambda *t: F.linear(*t, activation="gelu"), LINEAR, [R, S0, S0]),
    "linear, rows": (F.linear, LINEAR, [S2, S1, R]),
    "linear, rows, gelu": (lambda *t: F.linear(*t, activation="gelu"), LINEAR, [S2, S1, R]),
    "linear, samples, of which one has one more": (F.linear, LINEAR, [S0, R, R]),
    "linear, that fits nothing": (F.linear, LINEAR, [S0, S0, R]),
    "mlp": (lambda x, v, b, w, c: F.mlp(x, [v, w], [b, c]), MLP, [R, S0, S0, S1, R]),
    "mlp, output activation": (
        lambda x, v, b, w, c: F.mlp(x, [v, w], [b, c], output_activation="tanh"), MLP, [R, S0, S0, S1, R]
    ),
    "conv2d, channels": (lambda *t: F.conv2d(*t, padding=1), [(2, 2, 4, 4), (4, 2, 3, 3), (4,)], [R, S0, S0]),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2), [(2, 3, 4, 4)], [S1]),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, 8, w, b), [(2, 3, 8), (8,), (8,)], [S1, R, R]),
    "layer_norm, residual": (
        lambda x, r, w: torch.cat(F.layer_norm(x, 8, w, residual=r, return_residual=True)),
        [(2, 3, 8), (2, 3, 8), (8,)], [S1, S1, R],
    ),
    "layer_norm, along its axis": (lambda x, w: F.layer_norm(x, 8, w), [(3, 8), (8,)], [S1, R]),
    "embedding, columns": (lambda w: F.embedding(ids(2, 3), w), [(11, 6)], [S1]),
    "embedding, rows": (lambda i, w: F.embedding(i, w, 10), [ids(2, 3), (11, 6)], [R, S0]),
    "embedding, tokens": (lambda i, w, p: F.embedding(i, w, position=p), [ids(2, 3), (11, 6), (4, 6)], [S0, R, R]),
    "embedding, rows and positions": (
        lambda i, w, p: F.embedding(i, w, position=p), [ids(2, 3), (11, 6), (4, 6)], [R, S0, R]
    ),
    "attention, heads": (
        lambda *t: F.scaled_dot_product_attention(*t, is_causal=True, enable_gqa=True), HEADS, [S1, S1, S1]
    ),
    "attention, samples": (
        lambda q, k, v, mask, n: F.scaled_dot_product_attention(q, k, v, mask, key_lengths=n),
        [*SAMPLES, (torch.arange(60).view(2, 1, 5, 6) % 3 > 0), torch.tensor([6, 4])], [S0, S0, S0, R, S0],
    ),
    "linear_log_prob, tokens": (
        lambda x, w, t: sum(F.linear_log_prob(x, w, t, return_entropy=True)),
        [(2, 3, 8), (11, 8), ids(2, 3)], [S0, R, S0],
    ),
    "linear_cross_entropy, classes": (
        lambda x, w, b, t: F.linear_cross_entropy(x, w, t, linear_bias=b),
        [(3, 8), (11, 8), (11,), ids(3)], [R, S0, S0, R],
    ),
    "linear_cross_entropy, tokens": (
        lambda x, w, t: F.linear_cross_entropy(x, w, t, ignore_index=5), [(3, 8), (11, 8), ids(3)], [S0, R, S0]
    ),
    "linear_cross_entropy, sum": (
        lambda x, w, t: F.linear_cross_entropy(x, w, t, reduction="sum"), [(3, 8), (11, 8), ids(3)], [S0, R, R]
    ),
}  # fmt: skip


def leaves(tensors):
    return [t.clone().requires_grad_(t.is_floating_point()) for t in tensors]


def gradients(y, tensors):
    whole = y.full_tensor() if isinstance(y, DTensor) else y
    weights = torch.arange(1.0, whole.numel() + 1).view(whole.shape).cos()
    (whole * weights).sum().backward()
    grads = [t.grad for t in tensors if t.requires_grad]
    return [whole, *(g.full_tensor() if isinstance(g, DTensor) else g for g in grads)]


def difference(got, want):
    pairs = [(g.detach(), w.detach()) for g, w in zip(got, want, strict=True)]
    return max(float((g - w).abs().max() / w.abs().max().clamp(min=1)) for g, w in pairs)


def case(mesh, function, shapes, placements):
    tensors = drawn(*shapes)
    whole = leaves(tensors)
    want = gradients(function(*whole), whole)
    parts = [distribute_tensor(t, mesh, [p]).requires_grad_(t.is_floating_point()) for t, p in zip(
        tensors, placements, strict=True
    )]  # fmt: skip
    return difference(gradients(function(*parts), parts), want)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.norm = torch.nn.Embedding(11, 8), torch.nn.LayerNorm(8)
        self.qkv, self.out = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3)), torch.nn.Linear(8, 8)
        self.up, self.act, self.down = torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 8)

    def forward(self, tokens):
        x = self.table(tokens)
        y = self.norm(x)
        heads = [layer(y).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in self.qkv]
        x = x + self.out(F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(self.act(self.up(self.norm(x))))


def block(mesh):
    """A block of a transformer whose layers are replaced and then shared out as PyTorch's tutorial does."""
    results = []
    for parallel in (False, True):
        torch.manual_seed(0)
        model = Block()
        replace_modules(model)
        if parallel:
            plan = {f"qkv.{i}": ColwiseParallel() for i in range(3)}
            plan |= {"table": RowwiseParallel(input_layouts=R, output_layouts=R), "out": RowwiseParallel()}
            parallelize_module(model, mesh, plan | {"up": ColwiseParallel(), "down": RowwiseParallel()})
        y = model(ids(1, 4))
        results.append(gradients(y, list(model.parameters())))
    return difference(*results)


def sequence(mesh):
    """LayerNorm on parts of the sequence, gathered before the next layer."""
    results = []
    for parallel in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 4))
        replace_modules(model)
        if parallel:
            gathered = PrepareModuleInput(input_layouts=S1, desired_input_layouts=R)
            parallelize_module(model, mesh, {"0": SequenceParallel(use_local_output=False), "1": gathered})
            parallelize_module(model, mesh, {"1": ColwiseParallel(output_layouts=R)})
        (x,) = drawn((1, 4, 8))
        y = model(distribute_tensor(x, mesh, [S1]) if parallel else x)
        results.append(gradients(y, list(model.parameters())))
    return difference(*results)


def compiled(mesh):
    layer = torch.compile(lambda x, w, b: F.linear(x, w, b, activation="tanh"), backend="aot_eager", fullgraph=True)
    return case(mesh, layer, LINEAR, [R, S0, S0])


def refused(mesh):
    x, w = drawn((4, 8), (6, 8))
    try:
        F.linear(distribute_tensor(x, mesh, [R]), w.requires_grad_())
    except (TypeError, RuntimeError) as error:
        return 0.0 if "DTensor" in str(error) else str(error)
    return "not refused"


def main(folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    told = {name: lambda c=c: case(mesh, *c) for name, c in CASES.items()}
    told |= {f.__name__: lambda f=f: f(mesh) for f in (block, sequence, compiled, refused)}
    found = {"imported": "primer_fast.functional.shards" in sys.modules}  # and torch.distributed.tensor by it
    for path in ("kernels", "plain"):
        backend.stand_in = "cpu" if path == "kernels" else None
        for name, run in told.items():
            if (path, name) == ("plain", "compiled"):
                continue  # takes seconds
            try:
                found[f"{path}, {name}"] = run()
            except Exception as error:
                found[f"{path}, {name}"] = f"{type(error).__name__}: {error}"
    (Path(folder) / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
