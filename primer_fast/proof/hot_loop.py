"""What a kernel does most often, read from the machine code of an NVIDIA GPU: its hot loop, and what follows it."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

_LABEL = re.compile(r"\s*\.(L_\w+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([^;]*\S)\s*;")
_BRANCH = re.compile(r"BRA\b.*`\(\.(L_\w+)\)")
_PRODUCT = re.compile(r"(?:HGMMA|QGMMA|IGMMA|HMMA|QMMA|IMMA|DMMA|UTC\w*MMA)\b")
_WGMMA = re.compile(r"[HQI]GMMA\.(\d+)x(\d+)x(\d+)\S*\s+R\d+,\s*(\w+)")
_WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)")
_SPIN = 8  # instructions of a loop that waits for a barrier of memory and does nothing else


@dataclass(frozen=True)
class HotLoop:
    """Instructions of one warp in one step of the loop that is likely to take the most time; see ``read_hot_loop``."""

    instructions: int
    products: int  # on tensor cores
    from_shared: int  # wgmma with both operands in shared memory
    from_registers: int  # wgmma whose first operand comes from registers
    waits: int  # wgmma behind which the warp waits until all products are done, before it starts another
    matrix_moves: int  # LDSM, STSM: fragments of a matrix between registers and shared memory
    moves: int  # LDS, STS: other values
    barriers: int  # of all warps of a program
    epilogue: int  # instructions of a thread behind the last loop with products; 0 where none has any


@dataclass(frozen=True)
class _Loop:
    """Instructions ``first`` to ``last``, which jumps back."""

    first: int
    last: int

    def __contains__(self, other: "_Loop") -> bool:
        return self != other and self.first <= other.first and other.last <= self.last

    def __len__(self) -> int:
        return self.last - self.first + 1


def read_hot_loop(sass: str) -> HotLoop | None:
    """The hot loop of what nvdisasm -c wrote; None where there is no loop.

    It is a loop with products in which no other with products lies: of several the one with the most multiplications a
    step, and of those the shortest, which is attention's loop over keys that need no mask. Where nothing is multiplied
    on tensor cores, it is the longest loop that holds no other.

    The epilogue is what stands behind the last loop with products. Where a program makes one tile after another in a
    loop around it, the epilogue is what that loop holds beside it, if that is more.
    """
    code = _Code(sass)
    multiplying = [loop for loop in code.loops if code.work(loop)]
    candidates = _innermost(multiplying or code.loops)
    if not candidates:
        return None
    hot = max(candidates, key=lambda loop: (code.work(loop), -len(loop) if multiplying else len(loop)))
    body = code.of(hot)
    operands = [match[4] for line in body if (match := _WGMMA.match(line))]
    return HotLoop(
        len(body),
        sum(_PRODUCT.match(line) is not None for line in body),
        operands.count("gdesc"),
        len(operands) - operands.count("gdesc"),
        _waits(body),
        _number(body, r"(LDSM|STSM)\b"),
        _number(body, r"(LDS|STS)\b"),
        _number(body, r"BAR\.(SYNC|RED)"),
        code.epilogue(multiplying),
    )


def epilogue_per_element(loop: HotLoop | None, constexprs: dict, warps: int | None) -> float | None:
    """Instructions that a thread spends on each element of a product's tile once its sum is complete.

    Every instruction behind the products counts once, addresses and stores included, as does each side of a branch.
    None where ``constexprs`` do not say what tile a program makes, as attention's, whose products are not its result.
    """
    rows, columns = constexprs.get("BLOCK_M"), constexprs.get("BLOCK_N", constexprs.get("BLOCK_V"))
    attends = "BLOCK_DV" in constexprs
    if loop is None or not loop.products or not rows or not columns or not warps or attends:
        return None
    return loop.epilogue / (rows * columns / (32 * warps))


def instructions_of(sass: str) -> list[str]:
    """All instructions that nvdisasm -c wrote, without addresses and conditions."""
    return [match[1] for line in sass.splitlines() if (match := _INSTRUCTION.match(line))]


class _Code:
    """Instructions up to the last exit, behind which waits for memory and padding stand, and their loops."""

    def __init__(self, sass: str):
        self.lines: list[str] = []
        labels: dict[str, int] = {}
        end: int | None = None
        for line in sass.splitlines():
            if match := _LABEL.match(line):
                labels[match[1]] = len(self.lines)
            elif match := _INSTRUCTION.match(line):
                self.lines.append(match[1])
                if match[1] == "EXIT":
                    end = len(self.lines)
        del self.lines[end:]
        ends: dict[int, int] = {}  # first instruction of a loop -> the last that jumps back there
        for number, line in enumerate(self.lines):
            first = labels.get(match[1], number + 1) if (match := _BRANCH.match(line)) else number + 1
            if first <= number:
                ends[first] = number
        loops = [_Loop(first, last) for first, last in ends.items()]
        self.loops = [loop for loop in loops if not self._spins(loop)]

    def of(self, loop: _Loop) -> list[str]:
        return self.lines[loop.first : loop.last + 1]

    def work(self, loop: _Loop) -> int:
        """Multiplications of a wgmma, or 1 for each other product: the two do not stand in one loop."""
        return sum(_multiplications(line) for line in self.of(loop))

    def epilogue(self, multiplying: list[_Loop]) -> int:
        if not multiplying:
            return 0
        last = max(_innermost(multiplying), key=lambda loop: loop.first)
        around = [loop for loop in multiplying if last in loop]
        outermost = max(around, key=len, default=last)
        behind = _counted(self.lines[outermost.last + 1 :])
        if not around:
            return behind
        nearest = min(around, key=len)
        inner = [loop for loop in _innermost(multiplying) if loop in nearest]
        beside = _counted(self.of(nearest)) - sum(_counted(self.of(loop)) for loop in inner)
        return max(beside, behind)

    def _spins(self, loop: _Loop) -> bool:
        return len(loop) <= _SPIN and any(".TRYWAIT" in line for line in self.of(loop))


def _innermost(loops: list[_Loop]) -> list[_Loop]:
    return [loop for loop in loops if not any(other in loop for other in loops)]


def _multiplications(line: str) -> int:
    if match := _WGMMA.match(line):
        return int(match[1]) * int(match[2]) * int(match[3])
    return int(_PRODUCT.match(line) is not None)


def _waits(body: list[str]) -> int:
    """wgmma whose next wgmma or wait is a wait for all."""
    read = ((_WGMMA.match(line), _WAIT.match(line)) for line in body)
    left = [wait[1] if wait else "wgmma" for wgmma, wait in read if wgmma or wait]  # how many may go on after a wait
    return sum(a == "wgmma" and b == "0x0" for a, b in pairwise(left))


def _number(lines: Iterable[str], pattern: str) -> int:
    return sum(re.match(pattern, line) is not None for line in lines)


def _counted(lines: list[str]) -> int:
    return len(lines) - lines.count("NOP")
