"""What tests of several ops need."""

import pytest
import torch


@pytest.fixture
def far_rows():
    """(5, 2**29 + 16) float16: row 4 starts past 2**31 elements, so that row times stride must be formed in 64 bits."""
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of GPU memory")
    torch.utils.deterministic.fill_uninitialized_memory = False  # 5 GiB of NaN take their time
    try:
        return torch.empty(5, 2**29 + 16, dtype=torch.float16, device="cuda" if torch.cuda.is_available() else "cpu")
    except RuntimeError:
        pytest.skip("needs 5 GiB of memory")
