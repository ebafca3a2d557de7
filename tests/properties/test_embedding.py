import torch
from hypothesis import strategies as st
from properties.calls import FLOATS, explores, near, one_not_a_tensor, rarely, tensors

SIZES = (1, 2, 3, 5, 0, 17)


@st.composite
def calls(draw, path):
    size = st.sampled_from(SIZES)
    rows, width, positions = draw(st.integers(1, 9)), draw(size), draw(st.integers(1, 17))
    shape = tuple(draw(st.lists(size, max_size=3)))
    dtype = draw(st.sampled_from(FLOATS[path]))
    integers = st.sampled_from([torch.int64, torch.int32])
    of_ids = rarely(draw, draw(integers), torch.int16, torch.float32, torch.bool)
    high = rarely(draw, rows, rows + 2) if path == "plain" else rows  # outside, a row of NaN on a GPU
    arguments = {
        "input": draw(tensors(shape, of_ids, (0 if high == rows else -1, high))),
        "weight": draw(tensors(near(draw, (rows, width)), rarely(draw, dtype, torch.int64, torch.float32))),
        "padding_idx": rarely(
            draw, draw(st.sampled_from([None, 0, -1, rows - 1, -rows])), rows, -rows - 1, 1.0, True, "x"
        ),
        "position": None,
        "position_ids": None,
    }
    if draw(st.booleans()):
        shape_of_ids = [shape, shape[1:], (1,) * len(shape)]
        arguments["position"] = draw(tensors(near(draw, (positions, width)), dtype))
        if draw(st.booleans()):
            of_ids = rarely(draw, draw(integers), torch.int16, torch.float32)
            ids = tensors(near(draw, draw(st.sampled_from(shape_of_ids))), of_ids, (0, positions))
            arguments["position_ids"] = draw(ids)
    return one_not_a_tensor(draw, arguments, "input", "weight", "position", "position_ids")


def reference(input, weight, padding_idx, position, position_ids):
    if isinstance(padding_idx, bool | float):
        raise TypeError(f"torch takes {padding_idx} for an index")
    y = torch.nn.functional.embedding(input, weight, padding_idx)
    if position_ids is None and position is not None:
        position_ids = torch.arange(input.shape[-1], device=input.device)
    if position_ids is None:
        return y
    if torch.broadcast_shapes(position_ids.shape, input.shape) != input.shape:
        raise ValueError("position_ids are of more tokens than there are")
    return y + torch.nn.functional.embedding(position_ids, position)


# torch broadcasts a position of one feature
test_any_call = explores("embedding", calls, reference, refused=["position must have weight's"])
