import torch
from hypothesis import strategies as st
from properties.calls import FLOATS, SIZES, explores, near, one_not_a_tensor, rarely, tensors


@st.composite
def calls(draw, path):
    size = st.sampled_from(SIZES[path])
    width, classes = draw(size), draw(st.sampled_from([1, 2, 3, 9, 17, 40]))
    lead = tuple(draw(st.lists(size, max_size=2)))
    dtype = draw(st.sampled_from(FLOATS[path]))
    high = rarely(draw, classes, classes + 2) if path == "plain" else classes  # outside, NaN on a GPU
    arguments = {
        "input": draw(tensors((*lead, width), rarely(draw, dtype, torch.int64))),
        "linear_weight": draw(tensors(near(draw, (classes, width)), rarely(draw, dtype, torch.float32))),
        "target": draw(
            tensors(near(draw, lead), rarely(draw, torch.int64, torch.int32, torch.float32), (0, high), False)
        ),
        "linear_bias": draw(tensors(near(draw, (classes,)), dtype)) if draw(st.booleans()) else None,
        "reduction": rarely(draw, draw(st.sampled_from(["mean", "sum", "none"])), "max", None, 1),
        "ignore_index": rarely(draw, draw(st.sampled_from([-100, 0, 1, -1])), 1.0, "x", True),
        "label_smoothing": rarely(draw, draw(st.sampled_from([0.0, 0.1, 1.0])), -0.1, 1.1, "x", None),
    }
    return one_not_a_tensor(draw, arguments, "input", "linear_weight", "target", "linear_bias")


def reference(input, linear_weight, target, linear_bias, reduction, ignore_index, label_smoothing):
    if target.dtype != torch.int64 or isinstance(ignore_index, bool):
        raise TypeError("not built")
    logits = torch.nn.functional.linear(input, linear_weight, linear_bias)
    if target.shape != logits.shape[:-1] or len(linear_weight) == 0 or not 0 <= label_smoothing <= 1:
        raise ValueError("a target a row, some classes, a share")
    loss = torch.nn.functional.cross_entropy(
        logits.reshape(target.numel(), len(linear_weight)), target.flatten(),
        reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing,
    )  # fmt: skip
    return loss.view(target.shape) if reduction == "none" else loss


REFUSED = ["linear_bias must have one element per row"]  # torch broadcasts it
test_any_call = explores("linear_cross_entropy", calls, reference, of_kernels=4, refused=REFUSED)
