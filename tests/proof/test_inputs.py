"""Layouts lie in memory as their names say, and carry the values they were given."""

import numpy as np
import pytest
import torch

from primer_fast.proof.inputs import LAYOUTS, allocate, place

SHAPE = (6, 4, 8)
SHAPES = [SHAPE, (3, 1), (0, 5), (5, 0)]
LAST = ("channels_last", "heads_last")  # of four axes


@pytest.mark.parametrize("where", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("layout", "strides"),
    [
        (None, (32, 8, 1)),
        ("transposed", (32, 1, 4)),
        ("strided", (64, 16, 2)),
        ("expanded", (0, 8, 1)),
        ("offset", (32, 8, 1)),
        ("channels_last", (60, 1, 15, 3)),
        ("heads_last", (60, 5, 15, 1)),
    ],
)
def test_strides_and_alignment(layout, strides, where):
    shape = (2, 3, 4, 5) if layout in LAST else SHAPE
    t = allocate(shape, layout, torch.bfloat16, where)
    assert t.shape == shape and t.stride() == strides and t.dtype == torch.bfloat16
    assert t.data_ptr() % 16 == (2 if layout == "offset" else 0)


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        *((layout, shape) for layout in (None, *LAYOUTS) if not layout or "_last" not in layout for shape in SHAPES),
        *((layout, shape) for layout in LAST for shape in ((2, 3, 4, 5), (0, 3, 4, 5), (2, 1, 4, 4))),
    ],
    ids=str,
)
def test_values(layout, shape):
    array = np.random.default_rng(0).normal(size=shape)
    t = place(array, layout, torch.float16, "cpu")
    want = np.broadcast_to(array[:1], shape) if layout == "expanded" and shape[0] else array
    assert np.array_equal(t.numpy(), want.astype(np.float16))
    assert t.requires_grad_().is_leaf


def test_a_number():
    assert place(np.array(1.5), None, torch.float32, "cpu").item() == 1.5


@pytest.mark.parametrize(
    ("layout", "shape"), [("diagonal", SHAPE), ("transposed", (4,)), ("offset", ()), ("channels_last", SHAPE)]
)
def test_refuses_what_cannot_be(layout, shape):
    with pytest.raises(ValueError, match="layout must be one of transposed, strided"):
        allocate(shape, layout, torch.float32, "cpu")
