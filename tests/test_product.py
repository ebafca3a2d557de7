"""How products are cut up by the estimate, and the GPU for which they are."""

import json
from pathlib import Path

import pytest
import torch

from primer_fast import functional as F
from primer_fast.kernels import product as products
from primer_fast.kernels import tunable
from primer_fast.kernels.device import CHIPS, assume_chip, chip
from primer_fast.kernels.linear import BackwardProblem, backward_choice
from primer_fast.kernels.product import MatmulSettings, Product, matmul_choice
from primer_fast.reference.linear import CASES, sizes

ROOT = Path(__file__).parent.parent
H100, A100 = CHIPS["sm_90"], CHIPS["sm_80"]


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda c: c.arch)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_estimated_settings_fit_the_chip(case, itemsize, chip):
    M, K, N = sizes(case)
    for vector in (True, False):
        p = Product(M, N, K, itemsize, descriptors=vector and chip.has_descriptors, vector=vector, fused=True)
        s = matmul_choice(chip, p)
        stage = (2 * s.BLOCK_M + s.BLOCK_N) * s.BLOCK_K * itemsize
        assert stage * s.num_stages <= chip.shared
        assert min(s.BLOCK_M, s.BLOCK_N, s.BLOCK_K) >= 16, "the smallest tensor-core product"
        assert s.BLOCK_N // s.SUBTILES >= 16
        assert s.SPLITS == 1 or s.SPLITS * s.BLOCK_K <= K, "a split without work"


def test_large_products_get_the_large_tile():
    s = matmul_choice(H100, Product(8192, 8192, 8192, 2, descriptors=True))
    assert (s.BLOCK_M, s.BLOCK_N, s.SPLITS) == (128, 256, 1)


def test_a_long_reduction_with_few_tiles_is_split_to_fill_the_chip():
    s = matmul_choice(H100, Product(256, 256, 65536, 2, descriptors=True))
    assert s.SPLITS > 1
    assert products._programs(Product(256, 256, 65536, 2), s) >= H100.processors / 2


def test_the_assumed_chip_ends_with_its_context():
    before = chip()
    with pytest.raises(KeyError, match="sm_75"), assume_chip("sm_75"):
        pass
    with assume_chip("sm_80"):
        assert chip() == A100
    assert chip() == before


@pytest.mark.parametrize(("channels", "size"), [(64, 56), (128, 28), (256, 14), (512, 7)], ids=str)
def test_a_product_that_asks_for_it_fills_the_chip(channels, size):
    """dw of ResNet-50's 3 x 3 layers: few tiles, a long sum over pixels."""
    product = Product(channels, channels, 64 * size * size, 2, descriptors=True, fused=True, count=9, traffic=2**26)
    least, filled = (matmul_choice(H100, product._replace(fill=fill)) for fill in (1.0, 1.3))
    assert products._programs(product, filled) >= 0.95 * H100.processors > products._programs(product, least)
    assert filled.BLOCK_M >= 64
    assert products.estimate(H100, product, filled) <= 1.3 * products.estimate(H100, product, least)


def test_products_in_one_launch_count():
    """Nine at a time are nine times the tiles, and need no split to fill the chip."""
    one = Product(512, 512, 4096, 2, descriptors=True)
    nine = one._replace(count=9)
    s = MatmulSettings(128, 128, 64, 8, 3)
    assert products._programs(nine, s) == 9 * products._programs(one, s) == 144
    assert products.estimate(H100, nine, s) > products.estimate(H100, one, s)
    assert products.product_bucket(nine) != products.product_bucket(one)


def test_what_overlaps_nothing_costs_less_with_a_second_program_on_the_processor():
    """Splitting float32 into TF32 parts: beside it the other program multiplies."""
    product = Product(4096, 4096, 4096, 4, passes=3, descriptors=True)
    alone, beside = MatmulSettings(128, 128, 32, 8, 4), MatmulSettings(64, 128, 32, 4, 4)
    assert [products._residents(H100, product, s) for s in (alone, beside)] == [1, 2]
    assert products._alone(H100, product, beside) > 0 == products._alone(A100, product, beside)
    assert products.estimate(H100, product, beside) < 0.8 * products.estimate(H100, product, alone)
    assert products._residents(H100, product, matmul_choice(H100, product)) == 2


def test_a_costly_epilogue_is_estimated():
    product = Product(16384, 3072, 768, 2, descriptors=True)
    costly = product._replace(finish=15, double=True)
    s = MatmulSettings(128, 256, 64, 8, 4)
    ends = products.estimate(H100, costly, s) - products.estimate(H100, product, s)
    waves = -(-products._programs(product, s) // H100.processors)
    assert ends == pytest.approx(waves * 128 * 18 * 2 / 1.6e9), (
        "128 elements a thread, 18 instructions, two warps a part"
    )


@pytest.mark.parametrize(
    ("size", "way"),
    [
        ((4096, 4096, 4096), "prepass"),
        ((8192, 8192, 8192), "prepass"),
        ((512, 512, 512), "fused"),
        ((0, 8, 8), "fused"),
    ],
    ids=str,
)
def test_the_way_of_linears_backward_follows_from_its_size(size, way):
    """Writing the gradient once pays where the products are long; a small one would wait for another products."""
    assert backward_choice.default(H100, BackwardProblem(*size, 2)).variant == way


def test_the_estimate_of_shared_memory_is_not_below_what_kernels_take():
    table = json.loads((ROOT / "bench/results/offline/sm_90.json").read_text())
    rows = [row for row in table["rows"] if row["kernel"] == "matmul_kernel" and row["constexprs"]["DESCRIPTORS_IN"]]
    assert len(rows) > 20
    for row in rows:
        c = row["constexprs"]
        names = ("BLOCK_M", "BLOCK_N", "BLOCK_K")
        s = MatmulSettings(*(c[name] for name in names), row["warps"], row["stages"])
        p = Product(
            1, 1, 1, 4 if c["PRECISE"] else 2, 3 if c["PRECISE"] else 1, True, fused=c["GRADIENT_OF"] is not None
        )
        assert 0.7 * products._shared(p, s) <= row["resources"]["shared_bytes"] <= products._shared(p, s), row


@pytest.mark.parametrize("activation", ["gelu", "relu", None])
@pytest.mark.parametrize("op", ["linear", "mlp", "conv2d"])
def test_a_forward_is_cut_up_alike_with_and_without_a_gradient(op, activation, device):
    """Then it is bitwise equal: a policy and its frozen copy agree to the last bit."""
    x, w = torch.randn(200, 64, device=device), torch.randn(64, 64, device=device, requires_grad=True)
    pixels, taps = x.view(2, 64, 10, 10), w.view(64, 64, 1, 1).expand(64, 64, 3, 3)
    call = {
        "linear": lambda: F.linear(x, w, activation=activation),
        "mlp": lambda: F.mlp(x, [w, w], activation=activation),
        "conv2d": lambda: F.conv2d(pixels, taps, activation=activation),
    }[op]  # fmt: skip
    met = []
    with tunable.watching(lambda choice, gpu, p: met.append((choice.name, p)) or choice.chosen(gpu, p)):
        kept = call()
        number = len(met)
        with torch.no_grad():
            frozen = call()
    assert met[:number] == met[number:] and number > 0
    assert torch.equal(kept, frozen)
