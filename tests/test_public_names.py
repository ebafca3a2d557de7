"""What can be reached from ``import primer_fast``, and what dir, help and a star import make of it."""

import ast
import copy
import importlib
import pickle
import pydoc
from pathlib import Path

import pytest
import torch

import primer_fast
import primer_fast.functional as F
from primer_fast import nn
from primer_fast.reference.ops import OPS

ROOT = Path(primer_fast.__file__).parent
LAZY = ["primer_fast", "primer_fast.models", "primer_fast.train", "primer_fast.data", "primer_fast.reference"]
PUBLIC = sorted(
    path
    for folder in ("functional", "nn", "models", "train", "data", "reference", ".")
    for path in (ROOT / folder).glob("*.py")
    if path.stem not in ("__init__", "torchs_names")
)


@pytest.mark.parametrize("package", LAZY)
def test_all_that_a_package_lists_is_there_and_nothing_else_shows(package):
    module = importlib.import_module(package)
    for name in module.__all__:
        assert getattr(module, name) is not None
    assert {name for name in dir(module) if not name.startswith("__")} == set(module.__all__)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nonsense'"):
        _ = module.nonsense


def test_what_the_readme_names_is_listed():
    wanted = {"functional", "nn", "models", "train", "data", "replace_modules", "restore_modules", "sdpa"}
    assert wanted <= set(primer_fast.__all__)
    assert {"MLP", "CNN", "Transformer", "ViT", "generate", "load_gpt2", "load_bert"} <= set(primer_fast.models.__all__)
    assert {"supervised", "language_model", "sft", "reward", "ppo", "dpo"} <= set(primer_fast.train.__all__)
    assert primer_fast.functional.linear is F.linear and primer_fast.nn.Linear is nn.Linear
    assert primer_fast.models.MLP is primer_fast.models.mlp.MLP
    assert primer_fast.kernels.__name__ == "primer_fast.kernels", "reached, though not listed"
    shown = pydoc.plain(pydoc.render_doc(primer_fast))
    assert all(f"    {line}" in shown for line in primer_fast.__doc__.splitlines()[2:])
    assert "replace_modules(model" in shown and "TYPE_CHECKING" not in shown


def test_type_checkers_are_told_the_same_names():
    for package in LAZY[:-1]:
        tree = ast.parse(Path(importlib.import_module(package).__file__).read_text())
        branch = next(n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
        told = {alias.name for node in branch.body for alias in node.names}
        assert told == set(importlib.import_module(package).__all__), package


@pytest.mark.parametrize("path", PUBLIC, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_lists_what_it_defines(path):
    name = ".".join(("primer_fast", *path.relative_to(ROOT).with_suffix("").parts))
    listed = importlib.import_module(name).__all__
    defined = {n.name for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    assert {n for n in defined if not n.startswith("_")} <= set(listed)
    assert all(hasattr(importlib.import_module(name), n) for n in listed) and len(set(listed)) == len(listed)


TORCHS = {nn: torch.nn, F: torch.nn.functional}


@pytest.mark.parametrize("ours", TORCHS, ids=lambda m: m.__name__)
def test_what_is_not_replaced_is_torchs_own(ours):
    theirs = TORCHS[ours]
    replaced = {name for name in ours.__all__ if getattr(ours, name) is not getattr(theirs, name, None)}
    assert replaced == {
        nn: {
            "Conv2d", "Embedding", "LayerNorm", "Linear", "MaxPool2d", "MultiheadAttention", "attention", "functional",
        },
        F: {"fast_attention_backward", *OPS},
    }[ours]  # fmt: skip
    for name in replaced - {"attention", "functional", "fast_attention_backward"}:
        assert getattr(ours, name).__module__.startswith("primer_fast") and f"{name}" in ours.__doc__
    star: dict = {}
    exec(f"from {ours.__name__} import *", star)
    assert star.keys() - {"__builtins__"} == set(ours.__all__) <= set(dir(ours))
    public = {n for n, v in vars(theirs).items() if n[0].islower() and getattr(v, "__module__", "") == theirs.__name__}
    assert public <= set(ours.__all__)
    with pytest.raises(AttributeError, match=f"module '{ours.__name__}' has no attribute 'nonsense'"):
        _ = ours.nonsense
    told = ast.parse(Path(ours.__file__).with_name("torchs_names.py").read_text()).body[-1]
    names = [alias.name for alias in told.names]
    assert told.module == theirs.__name__ and all(alias.asname == alias.name for alias in told.names)
    assert len(names) > 100 and not set(names) & replaced, "a type checker would take torch's for ours"
    assert all(getattr(ours, name) is getattr(theirs, name) for name in names if hasattr(theirs, name))


def test_submodules_of_torchs_are_the_same_objects():
    assert nn.init is torch.nn.init and nn.utils is torch.nn.utils
    assert nn.functional is F and F._Reduction is torch.nn.functional._Reduction
    import primer_fast.nn.functional as by_import
    import primer_fast.nn.utils.rnn
    from primer_fast.nn.attention import SDPBackend, sdpa_kernel
    from primer_fast.nn.parameter import Parameter
    from primer_fast.nn.utils.prune import identity

    assert by_import is F and Parameter is torch.nn.Parameter
    assert sdpa_kernel is torch.nn.attention.sdpa_kernel and SDPBackend is torch.nn.attention.SDPBackend
    assert primer_fast.nn.utils.rnn.PackedSequence is torch.nn.utils.rnn.PackedSequence
    assert identity is torch.nn.utils.prune.identity and torch.nn.init.__spec__.name == "torch.nn.init"
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'primer_fast.nn.utils.nonsense'"):
        importlib.import_module("primer_fast.nn.utils.nonsense")


FILE = """
import math
import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.nn.init import trunc_normal_

class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width), heads
        self.drop = nn.Dropout(0.0)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=True)
        return self.drop(self.out(y.transpose(1, 2).flatten(2)))

class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict(dict(
            table=nn.Embedding(13, 8), positions=nn.Embedding(6, 8), norm=Norm(8), attention=Attention(8, 2),
            mlp=nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)),
            picture=nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2, 1, 1)),
        ))
        self.head = nn.Linear(8, 13, bias=False)
        self.parts.table.weight = self.head.weight
        self.apply(self.start)

    def start(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            trunc_normal_(module.weight, std=0.5)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 0.5)

    def forward(self, tokens):
        x = self.parts.table(tokens) + self.parts.positions(torch.arange(tokens.shape[1]))
        x = x + self.parts.attention(self.parts.norm(x))
        x = F.silu(x + self.parts.mlp(x))
        x = x + F.adaptive_avg_pool2d(self.parts.picture(x[:, None]), x.shape[1:]).mean(1)
        return F.cross_entropy(self.head(x).flatten(0, 1), tokens.flatten())
"""


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("torch.nn", "primer_fast.nn"),
        lambda text: text.replace("import torch.nn as nn", "from primer_fast import nn").replace(
            "from torch.nn import functional as F", "import primer_fast.functional as F"
        ),
    ],
    ids=["by name", "as documented"],
)
def test_a_model_file_whose_import_lines_are_changed(change, plain_path):
    models, results = [], []
    for text in (FILE, change(FILE)):
        namespace = {"__name__": "a_model_file"}
        exec(text, namespace)
        models.append(namespace["Model"]())
    theirs, ours = models
    ours.load_state_dict(theirs.state_dict())
    assert type(ours.head) is nn.Linear and type(ours.parts.mlp[0]) is nn.LayerNorm
    for model in (theirs, ours):
        loss = model(torch.arange(12).view(2, 6))
        loss.backward()
        results.append((loss, *(p.grad for p in model.parameters())))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    layers = pickle.loads(pickle.dumps(copy.deepcopy(ours.parts.mlp)))
    assert [type(m) for m in layers] == [nn.LayerNorm, nn.Linear, torch.nn.GELU, nn.Linear]


def test_compiled_code_knows_the_functions_that_are_torchs():
    def function(x):
        return F.relu(x) + nn.functional.softmax(x, dim=-1)

    x = torch.randn(2, 3)
    assert torch.equal(torch.compile(function, fullgraph=True, backend="eager")(x), function(x))
