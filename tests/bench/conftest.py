import gc

import pytest


@pytest.fixture(scope="session", autouse=True)
def frozen():
    """Each timing begins with a garbage collection, which looks at all that was imported, but not at what is frozen."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
