"""Pictures of any number of kernels, maps and tokens; and that a mark is where what it marks is."""

import matplotlib.image
import numpy as np
import pytest

from primer_fast.cli.train import cnn_plots, gpt_plots


def test_what_max_pool_keeps_is_marked_where_it_is(tmp_path, monkeypatch):
    """The dots of the picture lie on the largest pixel of each window that has one."""
    seen = {}
    monkeypatch.setattr("matplotlib.axes.Axes.scatter", lambda self, x, y, **style: seen.update(x=x, y=y))
    before = np.zeros((4, 4), dtype=np.float32)
    before[1, 0], before[0, 3], before[2, 2] = 5, 7, 9
    kept = np.array([[4, 3], [8, 10]])
    cnn_plots.max_pool(tmp_path / "a.png", before, before, np.array([[5.0, 7.0], [0.0, 9.0]]), kept, 2, "title")
    assert list(zip(seen["y"], seen["x"], strict=True)) == [(1, 0), (0, 3), (2, 2)]


@pytest.mark.parametrize("channels", [(1,), (40, 2, 9)], ids=str)
def test_kernels_and_maps_of_any_number_are_drawn(tmp_path, channels):
    weights = [np.zeros((o, c, 2, 3)) + i for i, (c, o) in enumerate(zip((1, *channels), channels, strict=False))]
    cnn_plots.kernels(tmp_path / "kernels.png", weights, "title")
    maps = {f"conv{i}": np.zeros((c, 4, 5)) for i, c in enumerate(channels)}
    cnn_plots.feature_maps(tmp_path / "maps.png", maps, np.array([0.2, 0.8]), 0, "title")
    for name in ("kernels.png", "maps.png"):
        assert matplotlib.image.imread(tmp_path / name).shape[1] > 300


def test_a_token_of_dollars_is_no_formula(tmp_path):
    names = ["$\\frac$", "$", "a"]  # as a formula the first would be an error
    gpt_plots.embeddings(tmp_path / "e.png", np.eye(3), names, "token")
    gpt_plots.attention(tmp_path / "a.png", [np.eye(3)[None]], names, "heads")
    assert (tmp_path / "e.png").exists() and (tmp_path / "a.png").exists()


def test_every_token_can_be_seen():
    assert [gpt_plots.visible(t) for t in ("a", " ", "\n", " cat", "\x00", "")] == ["a", "␣", "⏎", "␣cat", "�", "∅"]
    assert gpt_plots.visible("é世") == "é�"  # the font has no Chinese


def test_the_principal_plane_is_where_the_variance_is():
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.normal(size=(6, 6)))[0][:2]
    points = rng.normal(size=(50, 2)) * (5, 2)
    flat, share = gpt_plots.principal_plane(points @ directions + 3 + 1e-6 * rng.normal(size=(50, 6)))
    centred = points - points.mean(axis=0)
    np.testing.assert_allclose(np.abs(flat @ flat.T), np.abs(centred @ centred.T), atol=1e-3)
    assert share.sum() == pytest.approx(1) and share[0] > 0.8
    assert gpt_plots.principal_plane(np.ones((1, 3)))[0].tolist() == [[0, 0]]
