import re

import matplotlib.axes
import matplotlib.image
import torch

from primer_fast import backend
from primer_fast.cli import main
from primer_fast.cli.show import convolution as show_convolution

# Worked out by hand from the 0 and the kernel [[1, 1, 1], [0, 0, 0], [-1, -1, -1]].
CONVOLVED = [[1, 3, 1], [0, 0, 0], [-1, -3, -1]]
RECTIFIED = [[1, 3, 1], [0, 0, 0], [0, 0, 0]]
POOLED = [[3, 3], [0, 0]]
NUMBERS = [number for row in CONVOLVED for number in row]


def is_hand_written(example):
    results = example.convolved, example.rectified, example.pooled
    return [t.tolist() for t in results] == [CONVOLVED, RECTIFIED, POOLED]


def test_the_numbers_by_pytorch(plain_path):
    assert is_hand_written(show_convolution.compute())


def test_the_numbers_by_the_kernels(device):
    assert backend.runs_triton(torch.zeros(1, device=device))
    assert is_hand_written(show_convolution.compute())


def test_the_terminal_shows_every_sum_and_the_file_is_drawn(plain_path, tmp_path, capsys):
    path = tmp_path / "new folder" / "convolution.png"
    assert main(["show", "convolution", "--out", str(path)]) == 0
    printed = capsys.readouterr().out
    assert [int(n) for n in re.findall(r"= +(-?\d+)", printed)] == NUMBERS
    # Between two sums, the products: each list of nine adds up to its number.
    parts = re.split(r"line, column", printed)[1].split("ReLU")[0]
    terms = [int(a) * int(b) for a, b in re.findall(r"(-?\d+)\* *(-?\d+)", parts)]
    assert len(terms) == 81 and [sum(terms[i : i + 9]) for i in range(0, 81, 9)] == NUMBERS
    assert str(path) in printed
    height, width, _ = matplotlib.image.imread(path).shape
    assert height > 200 and width > 800


def test_the_picture_carries_the_numbers(plain_path, tmp_path, monkeypatch):
    written = []
    text = matplotlib.axes.Axes.text
    monkeypatch.setattr(matplotlib.axes.Axes, "text", lambda *args, **kw: written.append(args[3]) or text(*args, **kw))
    example = show_convolution.compute()
    show_convolution.draw(tmp_path / "a.png", example)
    matrices = (example.image, example.kernel, example.convolved, example.rectified, example.pooled)
    numbers = [str(int(v)) for t in matrices for v in t.flatten()]
    assert [word for word in written if re.fullmatch(r"-?\d+", word)] == numbers
