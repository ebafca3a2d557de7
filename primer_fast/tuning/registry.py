"""Every choice, of settings or of variants, that is searched, by name."""

from primer_fast.tuning.attention import ATTENTION
from primer_fast.tuning.matrix_products import PRODUCTS
from primer_fast.tuning.memory_bound import MEMORY_BOUND
from primer_fast.tuning.space import Space
from primer_fast.tuning.variants import VARIANTS

SPACES: dict[str, Space] = {space.choice.name: space for space in (*PRODUCTS, *ATTENTION, *MEMORY_BOUND, *VARIANTS)}
