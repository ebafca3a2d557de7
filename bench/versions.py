"""python -m primer_fast.bench.versions: the same code under the versions of PyTorch, Triton and NumPy that users have.

Makes a virtual environment for each set of versions, and in each: checks one case of every op in Triton's interpreter,
compiles what is launched in production for sm_90, and runs the tests of how ops behave as PyTorch's. No GPU takes part.
The differences become a table in docs/versions.md. What an earlier call has made or found is used again.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from primer_fast.bench import environment
from primer_fast.bench.files import replace_text
from primer_fast.bench.versions_table import PINNED, page, summaries

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".versions"
PAGE = ROOT / "docs" / "versions.md"
TESTS = ["pytest==9.1.1", "pytest-xdist==3.8.0", "setuptools"]
COMMANDS = ["tyro==1.0.17", "rich==15.0.0", "safetensors==0.8.0"]  # what `primer-fast verify` and `kernels` need
# A machine with few packages: what it lacks, a rehearsal under these versions lacks too.
GPU = ["torch==2.11.0", "triton==3.6.0", "numpy>=2.3,<2.6", "transformers==5.17.*", "hypothesis", "rich", "matplotlib"]
GPU += ["safetensors", "tokenizers"]


class Environment(NamedTuple):
    """One virtual environment."""

    requirements: list[str]
    python: str | None = None  # as 3.12; another Python is taken where this one is not installed


ENVIRONMENTS = {
    "oldest": Environment(["torch==2.11.0", "triton==3.6.0", "numpy==2.3.5", *COMMANDS, *TESTS], "3.12"),
    PINNED: Environment(["-c", "constraints.txt", "torch", "triton", "numpy", *COMMANDS, *TESTS]),
    "newest": Environment(["torch==2.15.0", "triton==3.9.0", "numpy==2.4.6", *COMMANDS, *TESTS]),
    "gpu": Environment([*GPU, *TESTS], "3.12"),
}
COMPARED = ("oldest", PINNED, "newest")
TESTED = ("tests/operators", "tests/citizenship", "tests/test_interpreter.py")
CASES = {  # op -> a small case with something to get wrong; no other op has one of that name
    "conv2d": "groups_wide",
    "embedding": "position_ids",
    "layer_norm": "pre_norm",
    "linear": "edges_aligned",
    "linear_cross_entropy": "ignored_class",
    "linear_log_prob": "entropy",
    "max_pool2d": "overlapping",
    "mlp": "edges_four",
    "scaled_dot_product_attention": "causal_many_keys",
}


class Part(NamedTuple):
    """What is run in each environment: a module with arguments, after which come a file for its results."""

    arguments: list[str]
    variables: dict[str, str]


def parts(jobs: int) -> dict[str, Part]:
    """The parts, in ``jobs`` processes each, by the name of the file that holds its results."""
    production = ["-m", "primer_fast.cli", "kernels", "--dtype", "bfloat16", "--jobs", str(jobs), "--json"]
    tests = ["-m", "pytest", *TESTED, "-p", "no:cacheprovider", "-n", str(jobs)]
    return {
        "verify.json": Part(["-m", "primer_fast.cli", "verify", "--case", *CASES.values(), "--json"], {}),
        "compile.json": Part(  # users must see no warning, and what is in Triton's cache gives none
            ["-W", "error::UserWarning", *production], {"TRITON_ALWAYS_COMPILE": "1"}
        ),
        "tests.xml": Part([*tests, "--junitxml"], {}),
    }


def make(name: str) -> Path:
    """The Python of one of ``ENVIRONMENTS``; made first where it is not there or was made of other requirements.

    Raises:
        subprocess.CalledProcessError: it could not be installed.
    """
    wanted, folder = ENVIRONMENTS[name], FOLDER / name
    python, ready = folder / "bin" / "python", folder / "ready"
    made_of = "\n".join(wanted.requirements)
    if "-c" in wanted.requirements:
        made_of += (ROOT / "constraints.txt").read_text(encoding="utf-8")
    if ready.is_file() and ready.read_text(encoding="utf-8").strip() == made_of.strip():
        return python
    print(f"{name}: installing {' '.join(wanted.requirements)}", flush=True)
    subprocess.run([interpreter(wanted.python), "-m", "venv", "--clear", str(folder)], check=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    uncapped = os.environ | {"PIP_CONSTRAINT": os.devnull}  # a machine's own cap knows nothing of these versions
    subprocess.run([*install, *wanted.requirements], check=True, cwd=ROOT, env=uncapped)
    subprocess.run([*install, "--no-deps", "--no-build-isolation", "-e", "."], check=True, cwd=ROOT)
    replace_text(ready, made_of)
    return python


def interpreter(version: str | None) -> str:
    """A Python of this version, from the PATH or where pyenv keeps them; the one that runs this where there is none."""
    if version is None:
        return sys.executable
    kept = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for candidate in [f"python{version}", *map(str, sorted(kept.glob(f"{version}.*/bin/python{version}")))]:
        try:
            subprocess.run([candidate, "--version"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        return candidate
    return sys.executable


def versions_of(python: Path) -> dict[str, str]:
    """Of Python and the three packages, without importing any."""
    names = ("python", "torch", "triton", "numpy")
    code = "import platform, importlib.metadata as m; print(platform.python_version(), *map(m.version, %r))"
    done = subprocess.run([python, "-c", code % (names[1:],)], check=True, capture_output=True, text=True)
    return dict(zip(names, done.stdout.split(), strict=True))


def measure(name: str, jobs: int, again: bool = False) -> Path:
    """Run the parts that have no result from the present source; returns the folder of results."""
    python, results = make(name), FOLDER / "results" / name
    results.mkdir(parents=True, exist_ok=True)
    record = results / "run.json"
    header = {**versions_of(python), "source": environment.source(), "jobs": jobs}
    done = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    if again or done.get("header") != header:
        done = {"header": header, "parts": {}}
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    for file, part in parts(jobs).items():
        if file in done["parts"]:
            print(f"{name}: {file} is there", flush=True)
            continue
        (results / file).unlink(missing_ok=True)
        begin = time.monotonic()
        with (results / f"{file}.log").open("w", encoding="utf-8") as log:
            command = [str(python), *part.arguments, str(results / file)]
            status = subprocess.run(command, cwd=ROOT, env=kept | part.variables, stdout=log, stderr=log).returncode
        done["parts"][file] = {"seconds": round(time.monotonic() - begin), "status": status}
        replace_text(record, json.dumps(done, indent=1))
        print(f"{name}: {file} in {done['parts'][file]['seconds']} s, exit status {status}", flush=True)
    return results


def main(argv: Iterable[str] | None = None) -> int:
    """The exit status is 0, or 1 where something was wrong under one of the versions, or 2 for a wrong call."""
    parser = argparse.ArgumentParser(prog="python -m primer_fast.bench.versions", description=__doc__.splitlines()[0])
    parser.add_argument("--make", choices=ENVIRONMENTS, help="only make this environment and print its Python")
    parser.add_argument("--only", nargs="+", choices=COMPARED, default=COMPARED, help="measure these")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile, or run tests (2)")
    parser.add_argument("--again", action="store_true", help="measure what an earlier call has measured")
    args = parser.parse_args(None if argv is None else list(argv))
    if args.jobs < 1:
        parser.error(f"--jobs must be positive; got {args.jobs}")
    if args.make:
        print(make(args.make))
        return 0
    for name in args.only:
        measure(name, args.jobs, args.again)
    there = {name: FOLDER / "results" / name for name in COMPARED}
    found = summaries({name: folder for name, folder in there.items() if (folder / "run.json").is_file()})
    replace_text(PAGE, page(PAGE.read_text(encoding="utf-8"), found).rstrip("\n"))
    print(f"the table is in {PAGE.relative_to(ROOT)}")
    return int(any(column.wrong for column in found.values()))


if __name__ == "__main__":
    sys.exit(main())
