"""The rules of the repository that a machine can check."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from primer_fast.reference.ops import OPS

ROOT = Path(__file__).parent.parent
ROOMS = [
    "kernels/{}",
    "primer_fast/functional/{}",
    "primer_fast/reference/{}",
    "tests/functional/test_{}",
    "bench/ops/{}",
]
# A layer may import itself and what stands after it; the rest of a list is what it may use besides.
LAYERS = ["cli", "train", "models", "nn", "functional", "kernels"]
BESIDE = {
    "cli": {"data", "proof", "bench", "tuning"},
    "train": {"data"},
    "functional": {"backend"},
    "kernels": set(),
    "reference": set(),
    "__init__": {"adopt", "data", "functional", "models", "nn", "reference", "train"},
    "lazy": set(),
    "files": set(),
    "adopt": {"functional", "kernels", "nn"},
    "data": set(),
    "backend": {"interpreter"},
    "interpreter": set(),
    "tuning": {"kernels", "backend", "proof", "bench", "reference"},
    "proof": {"functional", "kernels", "reference", "backend"},
    "bench": {"functional", "kernels", "reference", "backend", "proof", "nn", "models", "train", "data"},
}
SOURCES = sorted(
    p
    for folder in ("primer_fast", "kernels", "bench")
    for p in (ROOT / folder).rglob("*.py")
    if not p.stem.startswith("test_") and p.stem != "conftest"
)
KERNELS = [path for path in SOURCES if path.is_relative_to(ROOT / "kernels")]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def layer_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] in ("kernels", "bench") else parts[1]


def imported_layers(path: Path):
    """Layers of the package that a file imports, absolutely or by a relative import."""
    own = layer_of(path)
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                names = [f"primer_fast.{own}"]
            elif node.module == "primer_fast":
                names = [f"primer_fast.{alias.name}" for alias in node.names]
            else:
                names = [node.module]
        for name in names:
            parts = name.split(".")
            if parts[0] == "primer_fast" and len(parts) > 1:
                yield parts[1], node.lineno


@pytest.mark.parametrize("place", ROOMS)
@pytest.mark.parametrize("op", OPS)
def test_an_op_has_a_file_or_a_folder_in_every_room(op, place):
    path = ROOT / place.format(op)
    assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file(), place.format(op)


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_one_name_in_every_layer(op):
    import primer_fast.functional

    reference = importlib.import_module(f"primer_fast.reference.{op}")
    plain = importlib.import_module(f"primer_fast.functional.{op}")
    assert callable(getattr(primer_fast.functional, op))
    assert callable(getattr(plain, f"{op}_plain"))
    for name in (op, f"{op}_grad", f"{op}_magnitude", "flops", "bytes_moved"):
        assert callable(getattr(reference, name)), name
    assert all(case.why for case in reference.CASES)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_run_one_way(path):
    own = layer_of(path)
    below = set(LAYERS[LAYERS.index(own) :]) if own in LAYERS else {own}
    allowed = below | BESIDE.get(own, set()) | {"__version__", "lazy", "files"}
    for other, line in imported_layers(path):
        assert other in allowed, f"{path.relative_to(ROOT)}:{line}: {own} may not import {other}"


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "primer_fast" else ("primer_fast", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in SOURCES}


def imported_modules(module: str) -> set[str]:
    """Modules of ours that a module imports as it is loaded, not those that a function or a type checker asks for."""
    path, found = MODULES[module], set()
    package = module if path.stem == "__init__" else module.rpartition(".")[0]
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            source = ".".join(part for part in (above, node.module) if part)
            members = {f"{source}.{alias.name}" for alias in node.names}
            found |= members & MODULES.keys() or {source} & MODULES.keys()
    return found


def test_imports_run_in_no_circle():
    waiting = {module: imported_modules(module) - {module} for module in MODULES}
    while ready := [module for module, wanted in waiting.items() if not wanted & waiting.keys()]:
        for module in ready:
            del waiting[module]
    assert waiting == {}


@pytest.mark.parametrize("path", sorted((ROOT / "primer_fast" / "reference").glob("*.py")), ids=lambda p: p.name)
def test_reference_imports_numpy_alone(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.names[0].name if isinstance(node, ast.Import) else node.module
            assert module.split(".")[0] in {"numpy", "math", "dataclasses", "collections", "primer_fast"}, (
                f"{path.name}: {module}"
            )


def masked_loads_without_fill(source: str):
    """Line numbers of tl.load calls whose mask may leave elements undefined."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.load":
            names = {keyword.arg for keyword in node.keywords}
            if ("mask" in names and "other" not in names) or len(node.args) != 1:
                yield node.lineno


@pytest.mark.parametrize("path", KERNELS, ids=name_of)
def test_masked_loads_name_their_fill(path):
    """Triton leaves masked-off elements undefined; its interpreter returns 0 and hides that."""
    assert list(masked_loads_without_fill(path.read_text())) == []


def test_the_lint_of_masked_loads_finds_one():
    assert list(masked_loads_without_fill("a = tl.load(p, mask=m, other=0.0)\nb = tl.load(p, mask=m)")) == [2]


ATOMIC = {"kernels/attention/onepass.py"}  # opt-in, and never under torch.use_deterministic_algorithms(True)


@pytest.mark.parametrize("path", KERNELS, ids=name_of)
def test_kernels_add_no_floats_atomically(path):
    """The order of atomic additions is not fixed, and with it the result's last bits."""
    assert ("atomic_add" in path.read_text()) == (path.relative_to(ROOT).as_posix() in ATOMIC)


def in_the_encoding_of_the_locale(source: str):
    """Line numbers of files that are opened as text without saying in which encoding."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        name = ast.unparse(node.func)
        if name.endswith((".read_text", ".write_text")):
            yield node.lineno
        elif name == "open" or (name.endswith(".open") and name != "os.open"):
            modes = [value for value in ast.walk(node) if isinstance(value, ast.Constant)]
            if not any("b" in value.value for value in modes if isinstance(value.value, str)):
                yield node.lineno


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_are_utf8_whatever_the_locale(path):
    assert list(in_the_encoding_of_the_locale(path.read_text(encoding="utf-8"))) == []


def test_the_lint_of_encodings_finds_those_without():
    source = "p.read_text()\np.open('a')\nopen(p)\nopen(p, 'rb')\np.write_text(t, encoding='utf-8')\np.open(mode='wb')"
    assert list(in_the_encoding_of_the_locale(source)) == [1, 2, 3]


def test_kernels_folder_refuses_to_be_the_package_of_another_name():
    run = subprocess.run([sys.executable, "-c", "import kernels"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode != 0 and "pip install -e ." in run.stderr


def test_top_level_is_what_the_readme_maps():
    allowed = {
        "kernels", "primer_fast", "bench", "tests", "setup.py", "README.md", "Makefile", "constraints.txt", "LICENSE",
        "pyproject.toml", ".ci", ".gitignore", "docs", "MANIFEST.in",
    }  # fmt: skip
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    assert {line.split("/")[0] for line in listed.stdout.split()} <= allowed


def test_no_test_has_a_time_limit():
    """Only the limits that the code itself keeps are tested, against what would take a thousand seconds."""
    limits = re.compile(r"\(timeout=|, timeout=\d|(monotonic|perf_counter)\(\) - \w+ <")
    found = [
        p.name for p in (ROOT / "tests").rglob("*.py") if p.name != "test_layout.py" and limits.search(p.read_text())
    ]
    assert found == []
