"""Every public name says what it is; every op also its shapes, errors and source."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import primer_fast
import primer_fast.functional as F
from primer_fast import nn

ROOT = Path(primer_fast.__file__).parent
OPS = sorted(
    name
    for name, value in vars(F).items()
    if inspect.isfunction(value) and not name.startswith("_") and value.__module__.startswith("primer_fast")
)
MODULES = sorted(
    name for name, value in vars(nn).items() if inspect.isclass(value) and value.__module__.startswith("primer_fast.nn")
)
FILES = sorted(path for layer in ("models", "train", "data", "proof") for path in (ROOT / layer).glob("*.py"))


@pytest.mark.parametrize("op", OPS)
def test_an_op_says_its_shapes_errors_and_source(op):
    function = getattr(F, op)
    words = inspect.getdoc(function)
    for part in ("Raises:", "ValueError: ", "TypeError: ", "Source: "):
        assert part in words, part
    text = Path(inspect.getsourcefile(function)).read_text()
    signature = re.findall(rf"^def {op}\((.*?)^\).*?$", text, re.M | re.S)[-1]
    tensors = re.findall(r"^    \w+: (?:int \| )?Tensor.*", signature, re.M)
    assert tensors and all("  # " in line for line in tensors), tensors
    assert re.search(rf"^def {op}\(.*?^\) -> .*?:  # .*\(", text, re.M | re.S), "what it returns"


@pytest.mark.parametrize("name", MODULES)
def test_a_module_says_what_it_is_beside_torchs(name):
    module = getattr(nn, name)
    assert f"torch.nn.{name}" in inspect.getdoc(module)
    assert "# (" in inspect.getsource(module.forward) or "# as" in inspect.getsource(module.forward)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_public_name_has_a_docstring(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) or not tree.body
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            overload = any(isinstance(d, ast.Name) and d.id == "overload" for d in node.decorator_list)
            assert overload or ast.get_docstring(node), f"{path.name}: {node.name}"
