import math
import re

import matplotlib.axes
import matplotlib.image
import numpy as np
import pytest
import torch

from primer_fast import backend
from primer_fast.cli import main
from primer_fast.cli.show import attention as show_attention
from primer_fast.cli.show.attention import EMBEDDING, VOCABULARY, W_K, W_Q, W_V, WORDS


def by_formula():
    """The layer in NumPy, term by term."""
    table, w_q, w_k, w_v = (np.array(rows) for rows in (EMBEDDING, W_Q, W_K, W_V))
    position = np.array([
        [math.sin(t), math.cos(t), math.sin(t / 100), math.cos(t / 100)] for t in range(4)
    ])  # fmt: skip
    x = table[[2, 0, 3, 1]] + position  # What is your name
    q, k, v = x @ w_q, x @ w_k, x @ w_v
    scores = q @ k.T / 2  # the root of four columns
    weights = np.zeros((4, 4))
    for i in range(4):
        e = np.exp(scores[i, : i + 1])
        weights[i, : i + 1] = e / e.sum()
    o = weights @ v
    total = o + x
    centred = total - total.mean(axis=1, keepdims=True)
    y = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5)
    return {"position": position, "x": x, "query": q, "key": k, "value": v, "scores": scores, "weights": weights,
            "attended": o, "normed": y}  # fmt: skip


def is_by_formula(example):
    for name, want in by_formula().items():
        np.testing.assert_allclose(getattr(example, name).numpy(), want, atol=2e-6, err_msg=name)


def test_the_words_are_those_of_the_example():
    assert " ".join(WORDS) == "What is your name" and sorted(WORDS) == sorted(VOCABULARY)


def test_the_numbers_by_pytorch(plain_path):
    is_by_formula(show_attention.compute())


def test_the_numbers_by_the_kernels(device):
    assert backend.runs_triton(torch.zeros(1, device=device))
    is_by_formula(show_attention.compute())


def test_the_terminal_works_them_out_and_the_file_is_drawn(plain_path, tmp_path, capsys):
    path = tmp_path / "new folder" / "attention.png"
    assert main(["show", "attention", "--out", str(path)]) == 0
    printed = capsys.readouterr().out
    want = by_formula()
    numbers = [float(n) for n in re.findall(r"-?\d+\.\d\d", printed)]
    for name in want:
        for value in np.round(want[name], 2).flatten():
            assert any(abs(value - n) < 0.011 for n in numbers), (name, value)
    # Each sum of products that is spelled out comes to what stands behind it, but for the rounding of its terms.
    sums = re.findall(r"\((-?[\d.]+\*[^)]+)\) / 2 = (-?[\d.]+)", printed)
    sums += re.findall(r"name: ((?:-?[\d.]+\*-?[\d.]+(?: \+ )?){4}) = (-?[\d.]+)", printed)
    assert len(sums) == 5
    for i, (terms, total) in enumerate(sums):
        value = sum(float(a) * float(b) for a, b in (t.split("*") for t in terms.split(" + ")))
        assert value / (2 if i < 4 else 1) == pytest.approx(float(total), abs=0.03)
    (terms, share), = re.findall(r"exp\(0\.42\) / \(([^=]+)\) = ([\d.]+)", printed)  # fmt: skip
    exponents = [float(s) for s in re.findall(r"exp\((-?[\d.]+)\)", terms)]
    assert len(exponents) == 4
    assert math.exp(0.42) / sum(map(math.exp, exponents)) == pytest.approx(float(share), abs=0.01)
    assert printed.count("-inf") == 6 + 1 and "sqrt(d_model)" in printed and str(path) in printed
    height, width, _ = matplotlib.image.imread(path).shape
    assert height > 400 and width > 1000


def test_the_picture_carries_the_numbers(plain_path, tmp_path, monkeypatch):
    written = []
    text = matplotlib.axes.Axes.text
    monkeypatch.setattr(matplotlib.axes.Axes, "text", lambda *args, **kw: written.append(args[3]) or text(*args, **kw))
    example = show_attention.compute()
    show_attention.draw(tmp_path / "a.png", example)
    want = by_formula()
    shown = [float(w) for w in written]
    assert len(shown) == 8 * 16 and shown.count(-math.inf) == 6
    np.testing.assert_allclose(shown[:16], want["x"].flatten(), atol=0.006)
    np.testing.assert_allclose(shown[-16:], want["normed"].flatten(), atol=0.006)
    np.testing.assert_allclose(shown[5 * 16 : 6 * 16], want["weights"].flatten(), atol=0.006)
