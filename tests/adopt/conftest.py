import pytest

from primer_fast import functional as F


@pytest.fixture
def seen(monkeypatch):
    """Every call of our attention: how many heads queries and keys have, whether there is a mask."""
    calls, ours = [], F.scaled_dot_product_attention

    def spy(query, key, value, mask=None, *rest, **options):
        calls.append((query.shape[1], key.shape[1], mask is not None))
        return ours(query, key, value, mask, *rest, **options)

    monkeypatch.setattr("primer_fast.adopt.attention.F.scaled_dot_product_attention", spy)
    return calls
