import json

import pytest

from primer_fast.kernels import tunable


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """A folder of tuned files for the time of a test; call it to write one for a GPU."""
    folder = tmp_path / "tuned"
    folder.mkdir()
    monkeypatch.setattr(tunable, "TUNED", folder)
    tunable.forget_tuned()

    def write(gpu, settings):
        path = folder / f"{gpu.name}.json"
        path.write_text(settings if isinstance(settings, str) else json.dumps({"settings": settings}))
        tunable.forget_tuned()
        return path

    yield write
    tunable.forget_tuned()
