"""What the proof reads in machine code: loops, wgmma and its waits, the epilogue."""

import pytest

from primer_fast.proof.hot_loop import HotLoop, epilogue_per_element, instructions_of, read_hot_loop
from primer_fast.proof.resources import performance_warnings

pytestmark = pytest.mark.xdist_group("offline")

SS, RS = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24", "HGMMA.64x128x16.F32.BF16 R24, R76, gdesc[UR4], R24"
ALL, ONE = "WARPGROUP.DEPBAR.LE gsb0, 0x0", "WARPGROUP.DEPBAR.LE gsb0, 0x1"


def sass(text):
    """Machine code as nvdisasm -c writes it: an instruction or a label a line; a branch names its label."""
    lines = ['\t.section\t.text._k,"ax",@progbits', ".text._k:"]
    for number, line in enumerate(part.strip() for part in text.strip().splitlines()):
        if line.endswith(":"):
            lines.append(f".L_x_{line}")
        else:
            condition, _, rest = line.rpartition("| ")
            lines.append(f"        /*{16 * number:04x}*/         {condition} {rest} ;")
    return "\n".join(lines)


def to(label):
    return f"BRA `(.L_x_{label})"


PRODUCT = f"""
    MOV R1, R2
    @P0 | {to(9)}
    1:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR11], R3
    @!P1 | {to(2)}
    3:
    BAR.SYNC.DEFER_BLOCKING 0x0
    LDSM.16.M88.4 R76, [R2]
    WARPGROUP.ARRIVE
    {RS}
    {SS}
    {SS}, gsb0
    {ONE}
    LDS R8, [R9]
    STS [R9], R8
    STSM.16.M88.4 [R2], R76
    @!P1 | {to(1)}
    9:
    {ALL}
    FADD R1, R2, R3
    NOP
    STG.E.128 [R1], R2
    @!P2 | EXIT
    STG.E.128 [R1], R2
    EXIT
    2:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR11], R3
    @!P1 | {to(2)}
    {to(3)}
    4:
    {to(4)}
    NOP
    """


def test_the_loop_of_a_product():
    """Waits behind the last exit, and the jump back from there, are no loops and no epilogue; nor is padding."""
    want = HotLoop(
        instructions=13, products=3, from_shared=2, from_registers=1, waits=0, matrix_moves=2, moves=2, barriers=1,
        epilogue=6,
    )  # fmt: skip
    assert read_hot_loop(sass(PRODUCT)) == want
    assert len(instructions_of(sass(PRODUCT))) == 27


@pytest.mark.parametrize(
    ("body", "waits"),
    [
        ((SS, ONE, SS, ONE), 0),
        ((SS, SS, ALL), 1),
        ((SS, "FADD R1, R2, R3", ALL, RS, ALL), 2),
        ((ALL, SS, "FADD R1, R2, R3", SS), 0),
        ((SS, ONE, ALL), 0),
        (("DEPBAR.LE SB0, 0x0", SS, "DEPBAR.LE SB0, 0x0"), 0),  # of something else
    ],
)
def test_waits_directly_behind_a_product(body, waits):
    loop = read_hot_loop(sass("\n".join(["1:", *body, f"@P0 | {to(1)}", "EXIT"])))
    assert loop.waits == waits and loop.from_shared + loop.from_registers == sum("HGMMA" in line for line in body)


def test_the_loop_with_most_matrix_work_and_of_equals_the_shortest():
    small, large = SS.replace("x128x", "x64x"), SS
    text = f"""
        1:
        {small}
        {small}
        {small}
        @P0 | {to(1)}
        2:
        {large}
        {large}
        FADD R1, R2, R3
        FADD R1, R2, R3
        FADD R1, R2, R3
        @P0 | {to(2)}
        3:
        {large}
        {large}
        FADD R1, R2, R3
        FADD R1, R2, R3
        @P0 | {to(3)}
        EXIT
        """
    loop = read_hot_loop(sass(text))
    assert loop.instructions == 5 and loop.products == 2 and loop.epilogue == 1


def test_products_of_tiles_in_a_loop_around():
    """The epilogue is what that loop holds beside the products, where that is more than what follows."""
    inner = f"2:\n{SS}\n{SS}\n@P0 | {to(2)}\n"
    beside = "FADD R1, R2, R3\n" * 6
    text = f"1:\nMOV R1, R2\n{inner}{beside}@P1 | {to(1)}\nSTG.E [R1], R2\nEXIT"
    loop = read_hot_loop(sass(text))
    assert loop.instructions == 3 and loop.epilogue == 1 + 6 + 1
    behind = "STG.E [R1], R2\n" * 20
    loop = read_hot_loop(sass(f"1:\nMOV R1, R2\n{inner}{beside}@P1 | {to(1)}\n{behind}EXIT"))
    assert loop.epilogue == 21


def test_without_products_the_longest_loop_that_holds_no_other():
    fadd = "FADD R1, R2, R3\n"
    wait = f"4:\nSYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR11], R3\n{fadd * 5}@!P1 | {to(4)}\n"
    text = f"1:\n2:\n{fadd * 2}@P0 | {to(2)}\n{fadd}3:\n{fadd * 3}@P0 | {to(3)}\n{wait}@P0 | {to(1)}\nEXIT"
    assert read_hot_loop(sass(text)) == HotLoop(4, 0, 0, 0, 0, 0, 0, 0, 0)
    assert read_hot_loop(sass(f"{wait}{fadd}EXIT")) is None, "it waits for memory, and computes nothing"
    assert read_hot_loop(sass(f"{fadd}EXIT")) is None


def test_other_tensor_cores_count_as_products():
    loop = read_hot_loop(sass(f"1:\nHMMA.16816.F32.BF16 R4, R8, R12, R4\n@P0 | {to(1)}\nEXIT"))
    assert (loop.products, loop.from_shared, loop.from_registers, loop.waits) == (1, 0, 0, 0)


@pytest.mark.parametrize(
    ("constexprs", "want"),
    [
        ({"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64}, 4.0),
        ({"BLOCK_M": 128, "BLOCK_V": 128}, 8.0),
        ({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_DV": 64}, None),  # attention's products are not its result
        ({"BLOCK": 1024}, None),
    ],
)
def test_the_epilogue_of_an_element(constexprs, want):
    loop = HotLoop(86, 4, 4, 0, 0, 0, 0, 3, 512)
    assert epilogue_per_element(loop, constexprs, 8) == want
    assert epilogue_per_element(None, constexprs, 8) is None
    assert epilogue_per_element(HotLoop(86, 0, 0, 0, 0, 0, 0, 3, 0), constexprs, 8) is None


def test_warnings_of_ptxas():
    told = "(C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to a reason"
    log = f"ptxas info    : {told}\nptxas info    : Used 90 registers\nptxas info    : {told}\n"
    assert performance_warnings(log) == (told,)
    assert performance_warnings("ptxas info    : Used 90 registers") == ()


def test_ptxas_serialises_a_fused_product(seen):
    """A launch tells it, from Triton's cache too, and its machine code shows it."""
    plain, fused = seen["plain product"], seen["fused product"]
    assert not plain["serialized"] and plain["warnings"] == []
    assert fused["serialized"] and [w.split()[0] for w in fused["warnings"]] == ["(C7515)"]
    assert fused == seen["fused product from Triton's cache"]
    loop = plain["hot_loop"]
    assert (loop["from_shared"], loop["from_registers"], loop["waits"], loop["matrix_moves"]) == (4, 0, 0, 0)
    loop = fused["hot_loop"]
    assert (loop["from_shared"], loop["from_registers"], loop["waits"]) == (0, 4, 4) and loop["matrix_moves"] > 0
