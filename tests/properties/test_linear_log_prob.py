import math

import torch
from hypothesis import strategies as st
from properties.calls import FLOATS, SIZES, explores, near, one_not_a_tensor, rarely, tensors


def of_a_head(draw, path):
    """The tensors of a loss head."""
    size = st.sampled_from(SIZES[path])
    width, classes = draw(size), draw(st.sampled_from([1, 2, 3, 9, 17, 40]))
    lead = tuple(draw(st.lists(size, max_size=2)))
    dtype = draw(st.sampled_from(FLOATS[path]))
    reach = rarely(draw, (0, classes), (-2, classes + 2)) if path == "plain" else (0, classes)  # outside, NaN on a GPU
    of_target = tensors(near(draw, lead), rarely(draw, torch.int64, torch.int32, torch.float32), reach, False)
    arguments = {
        "input": draw(tensors((*lead, width), rarely(draw, dtype, torch.int64))),
        "linear_weight": draw(tensors(near(draw, (classes, width)), rarely(draw, dtype, torch.float32))),
        "target": draw(of_target),
        "linear_bias": draw(tensors(near(draw, (classes,)), dtype)) if draw(st.booleans()) else None,
    }
    return one_not_a_tensor(draw, arguments, *arguments)


@st.composite
def calls(draw, path):
    return of_a_head(draw, path) | {
        "temperature": rarely(draw, draw(st.sampled_from([1.0, 1, 0.5, 3.0])), 0, -1.0, math.nan, math.inf, "x", None),
        "return_entropy": draw(st.booleans()),
        "ignore_index": rarely(draw, draw(st.sampled_from([-100, 0, 1, -1, None])), 1.0, "x", True),
    }


def reference(input, linear_weight, target, linear_bias, temperature, return_entropy, ignore_index):
    if target.dtype != torch.int64 or not input.is_floating_point() or type(ignore_index) not in (int, type(None)):
        raise TypeError("dtype")
    if not 0 < temperature < math.inf or len(linear_weight) == 0:
        raise ValueError("range")
    logits = torch.nn.functional.linear(input, linear_weight, linear_bias)
    if target.shape != logits.shape[:-1]:
        raise ValueError("a target a row")
    ignored = target == (-100 if ignore_index is None else ignore_index)
    log_probs = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(dim=-1)
    chosen = log_probs.gather(-1, torch.where(ignored, 0, target)[..., None])[..., 0]
    entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
    results = tuple(y.masked_fill(ignored, 0) for y in (chosen, entropy))
    return results if return_entropy else results[0]


REFUSED = ["linear_bias must have one element per row"]  # torch broadcasts it
test_any_call = explores("linear_log_prob", calls, reference, of_kernels=4, refused=REFUSED)
