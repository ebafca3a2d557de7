"""Digits drawn by a program, for a machine that has no data set: ten glyphs, each image a new distortion of one.

    image(p) = ink((glyph(A (p + bend(p)) + b) - level) / softness) + noise

A turns, scales and shears, b moves, bend is a smooth field of four by four random arrows, level makes strokes thick
or thin. It is not MNIST: a time or an accuracy on these images compares programs with each other, nothing else. Of
10,000 to test on a linear model has 96 % right after six times through the 60,000, the MLP of the demo 99 % after five.
"""

__all__ = ["CHUNK", "GLYPHS", "SIDE", "draw_digits"]

import torch
import torch.nn.functional as F
from torch import Tensor

from primer_fast.data.digits import CLASSES, Digits

SIDE = 28  # pixels of an image, as MNIST's
CHUNK = 10_000  # images drawn at once, which bounds the memory
GLYPHS = (  # seven rows of five cells each
    "01110 10001 10011 10101 11001 10001 01110", "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00110 01000 10000 11111", "11110 00001 00001 01110 00001 00001 11110",
    "00010 00110 01010 10010 11111 00010 00010", "11111 10000 11110 00001 00001 10001 01110",
    "00110 01000 10000 11110 10001 10001 01110", "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110", "01110 10001 10001 01111 00001 00010 01100",
)  # fmt: skip


def draw_digits(
    train: int = 60_000, test: int = 10_000, *, seed: int = 0, device: torch.device | str = "cpu"
) -> Digits:
    """``train`` and ``test`` images with as many of each class, in random order, on ``device``.

    What is random is drawn on the CPU, so that the same seed gives the same digits everywhere, up to rounding.

    Raises:
        ValueError: a number of images that the ten classes do not divide, or none.
    """
    for name, count in (("train", train), ("test", test)):
        if count <= 0 or count % CLASSES:
            raise ValueError(f"draw_digits: {name} must be a positive multiple of {CLASSES}; got {count}")
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(train + test) % CLASSES
    labels = torch.cat([part[torch.randperm(len(part), generator=generator)] for part in labels.split([train, test])])
    images = torch.cat([_draw(part, generator, device) for part in labels.split(CHUNK)])
    labels = labels.to(device)
    return Digits(images[:train], labels[:train], images[train:], labels[train:])


def _draw(labels: Tensor, generator: torch.Generator, device: torch.device | str) -> Tensor:  # (N,) -> (N, H, W) uint8
    count = len(labels)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return (torch.rand(count, *shape, generator=generator) * (high - low) + low).to(device)

    angle, shear, aspect = uniform(-0.2, 0.2), uniform(-0.2, 0.2), uniform(0.9, 1.1)
    size, level = uniform(0.95, 1.15), uniform(0.22, 0.5)
    shift, bend = uniform(-0.12, 0.12, 2), uniform(-0.2, 0.2, 2, 4, 4)
    noise = torch.randint(0, 90, (count, SIDE, SIDE), generator=generator, dtype=torch.uint8).to(device)

    turn = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), dim=1).view(count, 2, 2)
    lean = torch.stack((aspect, shear, torch.zeros_like(shear), 1 / aspect), dim=1).view(count, 2, 2)
    affine = torch.cat((size[:, None, None] * turn @ lean, shift[:, :, None]), dim=2)
    places = F.affine_grid(affine, [count, 1, SIDE, SIDE], align_corners=False)
    places = places + F.interpolate(bend, (SIDE, SIDE), mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
    field = F.grid_sample(_glyphs().to(device)[labels.to(device)], places, align_corners=False)[:, 0]
    ink = torch.sigmoid((field - level[:, None, None]) / 0.08)
    return (ink * 200 * uniform(0.6, 1.0, 1, 1) + noise * 0.6).clamp_(0, 255).to(torch.uint8)


def _glyphs() -> Tensor:
    """(10, 1, 27, 21): every cell three pixels wide, a cell of background around, edges blurred."""
    cells = torch.tensor([[[int(c) for c in row] for row in glyph.split()] for glyph in GLYPHS])
    pixels = F.pad(cells, (1, 1, 1, 1)).repeat_interleave(3, dim=1).repeat_interleave(3, dim=2)
    return F.avg_pool2d(pixels[:, None].float(), 3, stride=1, padding=1)
