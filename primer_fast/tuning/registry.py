"""Every choice that is searched, by name. Of choices between ways to compute the same, every way is tried."""

from primer_fast.kernels import linear
from primer_fast.kernels.attention import onepass as attention_onepass
from primer_fast.kernels.matmul import operands_choice
from primer_fast.kernels.tunable import Variant, Variants
from primer_fast.tuning.attention import ATTENTION
from primer_fast.tuning.matrix_products import PRODUCTS
from primer_fast.tuning.memory_bound import MEMORY_BOUND
from primer_fast.tuning.space import Space

_PRODUCT = ("matmul_kernel", "reduce_partials_kernel")


def _space(choice: Variants, kernels: tuple[str, ...], inside: tuple[str, ...], late: bool = False) -> Space:
    return Space(choice, kernels, lambda gpu, p: map(Variant, choice.ways), lambda gpu, p, s: 0.0, inside, late)


VARIANTS = (
    _space(
        linear.backward_choice, ("activation_prepass_kernel", "add_rows_kernel", *_PRODUCT),
        ("matmul_operands", "matmul"),
    ),
    _space(operands_choice, _PRODUCT, ("matmul",), late=True),
    _space(
        attention_onepass.backward_choice,
        (
            "attention_statistics_kernel", "attention_onepass_kernel", "attention_onepass_cast_kernel",
            "attention_backward_kv_kernel", "attention_backward_q_kernel",
        ),
        ("attention_backward_kv", "attention_backward_q"),
    ),
)  # fmt: skip

SPACES: dict[str, Space] = {space.choice.name: space for space in (*PRODUCTS, *ATTENTION, *MEMORY_BOUND, *VARIANTS)}
