"""The GPUs that kernels are compiled for without one, and a driver that stands in for theirs.

Sources: CUDA C++ programming guide, table "technical specifications per compute capability"; NVIDIA's A100, H100 SXM
and B200 data sheets; AMD's CDNA3 instruction set guide and MI300X data sheet.
"""

from dataclasses import dataclass, replace

import torch
from triton.backends.compiler import GPUTarget

from primer_fast.kernels.device import Chip


@dataclass(frozen=True)
class Target:
    """One GPU; sizes of memory in bytes."""

    name: str
    gpu: str
    triton: GPUTarget
    processors: int  # multiprocessors, or compute units
    shared_per_program: int
    shared_per_processor: int
    shared_reserved: int  # by the system for each resident program
    warps_per_processor: int
    registers_per_processor: int  # of 32 bits, one thread's share of a warp counted once per thread
    register_step: int  # registers per thread come in multiples of this
    programs_per_processor: int

    @property
    def is_amd(self) -> bool:
        return self.triton.backend == "hip"

    @property
    def has_wgmma(self) -> bool:
        return not self.is_amd and self.triton.arch == 90

    def resident_programs(self, warps: int, registers: int, shared: int, tensor_columns: int = 0) -> int:
        """How many programs of ``warps`` warps, ``registers`` per thread and ``shared`` bytes a processor holds.

        tensor_columns: of Blackwell's tensor memory, which has 512.
        """
        per_thread = -(-max(registers, 1) // self.register_step) * self.register_step
        partitions = 4  # a warp lives in one of four parts, each with its share of warps and registers
        warps_per_part = min(
            self.warps_per_processor // partitions,
            self.registers_per_processor // partitions // (per_thread * self.triton.warp_size),
        )
        by_memory = self.shared_per_processor // max(shared + self.shared_reserved, 1)
        by_tensor_memory = 512 // tensor_columns if tensor_columns else self.programs_per_processor
        return min(warps_per_part * partitions // warps, by_memory, by_tensor_memory, self.programs_per_processor)


def _cuda(name, gpu, arch, processors, shared_kib):
    return Target(
        name, gpu, GPUTarget("cuda", arch, 32), processors, (shared_kib - 1) * 1024, shared_kib * 1024, 1024,
        warps_per_processor=64, registers_per_processor=65536, register_step=8, programs_per_processor=32,
    )  # fmt: skip


TARGETS = {
    "sm_80": _cuda("sm_80", "A100 SXM", 80, 108, 164),
    "sm_90": _cuda("sm_90", "H100 SXM", 90, 132, 228),
    "sm_100": _cuda("sm_100", "B200", 100, 148, 228),
    "gfx942": Target(
        "gfx942", "MI300X", GPUTarget("hip", "gfx942", 64), 304, 65536, 65536, 0,
        warps_per_processor=32, registers_per_processor=4 * 512 * 64, register_step=8, programs_per_processor=32,
    ),
}  # fmt: skip


def target_of(gpu: Chip) -> Target:
    """What to compile for a chip; one whose architecture TARGETS lacks is like the most similar there."""
    if gpu.arch in TARGETS:
        return TARGETS[gpu.arch]
    if gpu.is_amd:
        return replace(TARGETS["gfx942"], name=gpu.arch, gpu=gpu.name, triton=GPUTarget("hip", gpu.arch, 64))
    like = TARGETS["sm_90" if gpu.has_descriptors else "sm_80"]
    triton = GPUTarget("cuda", int(gpu.arch.removeprefix("sm_")), 32)
    sizes = {"processors": gpu.processors, "shared_per_program": gpu.shared, "shared_per_processor": gpu.shared + 1024}
    return replace(like, name=gpu.arch, gpu=gpu.name, triton=triton, **sizes)


class StandInDriver:
    """Answers what launchers and Triton's compiler ask a driver, for a GPU that is not there; it cannot launch."""

    def __init__(self, target: Target):
        self.target = target
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return self.target.triton

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_device_properties(self, device: int) -> dict:
        return {
            "name": self.target.gpu,
            "max_shared_mem": self.target.shared_per_program,
            "multiprocessor_count": self.target.processors,
            "max_num_regs": self.target.registers_per_processor,
            "warpSize": self.target.triton.warp_size,
        }
