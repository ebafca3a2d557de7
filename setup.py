"""kernels/ and bench/ sit at the top of the repository and are installed inside the package."""

from pathlib import Path

from setuptools import find_packages, setup

CLI = ["tyro>=1.0", "rich>=14", "matplotlib>=3.9", "safetensors>=0.5", "tokenizers>=0.20"]
DEMO = [*CLI, "mlxtend>=0.23", "vaderSentiment>=3.3"]
TEST = ["pytest>=8", "pytest-xdist>=3.6", "pytest-benchmark>=5", "hypothesis>=6", "transformers>=4.50"]
TEST += ["expecttest>=0.2", "trl>=1.16"]  # torch's operator samples need the first; the other is compared with

BENCH = ["liger-kernel>=0.8.5", "cut-cross-entropy>=25.1"]  # peers that are timed beside ours, on a GPU

setup(
    name="primer-fast",
    version="0.1.0",
    description="Hand-written Triton kernels for PyTorch, and a machine-learning primer trained on them",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    keywords=["triton", "pytorch", "gpu", "kernels", "attention", "cross-entropy", "transformer", "dpo", "ppo"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Education",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    package_dir={
        "primer_fast": "primer_fast",
        "primer_fast.kernels": "kernels",
        "primer_fast.bench": "bench",
    },
    packages=[
        *find_packages(include=["primer_fast", "primer_fast.*"]),
        "primer_fast.kernels",
        *(f"primer_fast.kernels.{name}" for name in find_packages("kernels")),
        "primer_fast.bench",
        *(f"primer_fast.bench.{name}" for name in find_packages("bench")),
    ],
    package_data={
        "primer_fast": ["py.typed"],
        "primer_fast.kernels": ["tuned/*.json"],
        "primer_fast.bench": ["results/*.json", "results/*/*.json"],
    },
    python_requires=">=3.10",
    install_requires=["torch>=2.11", "triton>=3.6", "numpy>=1.26"],
    extras_require={
        "cli": CLI,
        "demo": DEMO,
        "test": TEST,
        "bench": BENCH,
        "dev": [*DEMO, *TEST, "ruff>=0.12", "mypy>=1.18"],
    },
    entry_points={"console_scripts": ["primer-fast = primer_fast.cli:main"]},
)
