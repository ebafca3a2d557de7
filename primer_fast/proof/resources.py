"""What a compiled kernel needs of a GPU, read from its machine code; no GPU takes part."""

import contextlib
import functools
import io
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from triton import knobs
from triton.compiler import make_backend

from primer_fast.proof.hot_loop import HotLoop, instructions_of, read_hot_loop
from primer_fast.proof.targets import Target

# Opcode -> what it is counted as; the first pattern that matches counts. A "narrow" access moves less than 16 bytes.
_SASS = [
    ("matrix", r"(HGMMA|QGMMA|IGMMA|HMMA|QMMA|IMMA|DMMA|UTC\w*MMA)\b"),
    ("tma load", r"UTMALDG\b"),
    ("tma store", r"UTMA(STG|REDG)\b"),
    ("async wide load", r"LDGSTS\b.*\.128"),
    ("async narrow load", r"LDGSTS\b"),
    ("wide load", r"LDG\b.*\.128"),
    ("narrow load", r"LDG\b"),
    ("wide store", r"STG\b.*\.128"),
    ("narrow store", r"STG\b"),
    ("spill", r"(LDL|STL)\b"),
    ("ffma", r"FFMA2?\b"),
]
_AMDGCN = [
    ("matrix", r"(v_s?mfmac?)_"),
    ("async wide load", r"(buffer|global)_load_dwordx4\b.*\blds\b"),
    ("async narrow load", r"(buffer|global)_load_\w+\b.*\blds\b"),
    ("wide load", r"(buffer|global|flat)_load_dwordx4\b"),
    ("narrow load", r"(buffer|global|flat)_load_"),
    ("wide store", r"(buffer|global|flat)_store_dwordx4\b"),
    ("narrow store", r"(buffer|global|flat)_store_"),
    ("spill", r"scratch_(load|store)_"),
    ("ffma", r"v_(pk_)?fmac?_f32\b"),
]


@dataclass(frozen=True)
class Resources:
    """Of one compiled kernel. Instructions are counted where they stand in the code, not as often as they run."""

    registers: int  # per thread
    spill_bytes: int  # of local memory per thread
    spill_instructions: int  # loads and stores of local memory
    shared_bytes: int  # per program
    programs_per_processor: int  # that fit a multiprocessor or compute unit at once
    matrix: dict[str, int]  # opcode -> count: HGMMA is Hopper's wgmma, UTC*MMA Blackwell's tcgen05, HMMA mma.sync
    loads: dict[str, int]  # "tma", "async wide" (16 bytes), "async narrow", "wide", "narrow" -> count
    stores: dict[str, int]  # "tma", "wide", "narrow" -> count
    ffma: int  # float32 multiply-adds outside the tensor cores
    instructions: int
    warnings: tuple[str, ...] = ()  # of ptxas, about performance; it has none on AMD
    hot_loop: HotLoop | None = None  # None without a loop, and on AMD

    @property
    def spills(self) -> bool:
        return self.spill_bytes > 0 or self.spill_instructions > 0

    @property
    def serialized(self) -> bool:
        """Each wgmma waits for the one before, whatever the kernel asked for."""
        return are_serialized(self.warnings)


def are_serialized(warnings: Iterable[str]) -> bool:
    """Whether ptxas warns that each wgmma waits for the one before."""
    return any("instructions are serialized" in warning for warning in warnings)


def read_resources(kernel, target: Target) -> Resources:
    """The resources of a ``triton.compiler.CompiledKernel``; one binary is read once per process."""
    text = kernel.asm["amdgcn"] if target.is_amd else kernel.asm["cubin"]
    tensor_columns = getattr(kernel.metadata, "tmem_size", 0) if target.name == "sm_100" else 0
    read = _read(text, target, kernel.metadata.num_warps, kernel.metadata.shared, tensor_columns)
    return replace(read, warnings=warnings_of(kernel, target))


def warnings_of(kernel, target: Target) -> tuple[str, ...]:
    """What ptxas has to say of a kernel's performance; nothing for AMD, whose kernels it does not assemble."""
    if target.is_amd:
        return ()
    options = kernel.metadata.enable_fp_fusion, kernel.metadata.ptx_options
    return _warnings(kernel.asm["ptx"], target, *options)


def registers_and_spills(kernel, target: Target) -> tuple[int, int]:
    """Registers and spilled bytes per thread, without taking the code apart: some ten times as fast."""
    return _usage(kernel.asm["amdgcn"] if target.is_amd else kernel.asm["cubin"])


def _usage(code: str | bytes) -> tuple[int, int]:
    if isinstance(code, str):  # AMD's; accumulation registers included: on CDNA3 they share one file
        return _number(r"\.vgpr_count:\s*", code), _number(r"\.private_segment_fixed_size:\s*", code)
    usage = _run_tool("cuobjdump", code, "--dump-resource-usage")
    return _number("REG:", usage), _number("STACK:", usage)


def _number(label: str, text: str) -> int:
    """The number after the first match of ``label``."""
    found = re.search(rf"{label}(\d+)", text)
    if found is None:
        raise ValueError(f"resources: a compiled kernel must come with a number after {label!r}; got none")
    return int(found[1])


@functools.lru_cache(maxsize=1024)
def _read(code: str | bytes, target: Target, warps: int, shared: int, tensor_columns: int) -> Resources:
    registers, spill_bytes = _usage(code)
    if isinstance(code, str):
        lines = [line.strip() for line in code.splitlines() if re.match(r"\s+[a-z]\w*_\w+(\s|$)", line)]
        patterns, hot_loop = _AMDGCN, None
    else:
        sass = _run_tool("nvdisasm", code, "-ndf", "-c")  # without data flow, which takes a third of the time
        lines, hot_loop = instructions_of(sass), read_hot_loop(sass)
        patterns = _SASS
    counts, matrix = _count(lines, patterns)
    group = lambda word: {k[: -len(word) - 1]: n for k, n in sorted(counts.items()) if k.endswith(" " + word)}  # noqa: E731
    return Resources(
        registers, spill_bytes, counts["spill"], shared,
        target.resident_programs(warps, registers, shared, tensor_columns),
        matrix, group("load"), group("store"), counts["ffma"], len(lines),
        hot_loop=hot_loop,
    )  # fmt: skip


def _count(lines: list[str], patterns: list[tuple[str, str]]) -> tuple[Counter[str], dict[str, int]]:
    counts: Counter[str] = Counter()
    matrix: Counter[str] = Counter()
    compiled = [(kind, re.compile(pattern)) for kind, pattern in patterns]
    for line in lines:
        for kind, pattern in compiled:
            if match := pattern.match(line):
                counts[kind] += 1
                if kind == "matrix":
                    matrix[match[1].removeprefix("v_")] += 1
                break
    return counts, dict(matrix)


@functools.lru_cache(maxsize=1024)
def _warnings(ptx: str, target: Target, fused: bool, options: str | None) -> tuple[str, ...]:
    """Triton does not show what ptxas says, and its cache does not keep it.

    Triton assembles the kernel once more, with its own choice of options; some 0.1 s. fused: a product and a sum may
    become one instruction. options: others, as given at the launch.
    """
    backend = make_backend(target.triton)
    chosen = {"enable_fp_fusion": fused, "ptx_options": options}
    log = io.StringIO()
    with knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        backend.make_cubin(ptx, {}, backend.parse_options(chosen), target.triton.arch)
    return performance_warnings(log.getvalue())


def performance_warnings(log: str) -> tuple[str, ...]:
    """Those in what ptxas -v wrote, each once."""
    return tuple(dict.fromkeys(re.findall(r"\(C\d+\) Potential Performance Loss: .*", log)))


def _run_tool(name: str, cubin: bytes, *options: str) -> str:
    """Output of one of the CUDA tools that come with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [getattr(knobs.nvidia, name).path, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
