import torch
from hypothesis import strategies as st
from properties.calls import FLOATS, SIZES, explores, near, one_not_a_tensor, rarely, tensors


@st.composite
def calls(draw, path):
    size = st.sampled_from(SIZES[path])
    lead, shape = draw(st.lists(size, max_size=2)), tuple(draw(st.lists(size, min_size=1, max_size=2)))
    dtype = draw(st.sampled_from(FLOATS[path]))
    values = draw(st.sampled_from(["normal", "normal", "normal", "integers"]))
    spelt = draw(st.sampled_from([shape, list(shape), torch.Size(shape)]))
    if len(shape) == 1 and draw(st.booleans()):
        spelt = shape[0]
    of_parameters = rarely(draw, dtype, torch.float32, torch.int64)
    arguments = {
        "input": draw(tensors((*lead, *shape), rarely(draw, dtype, torch.int64), values)),
        "normalized_shape": rarely(draw, spelt, (), (-1,), 3, (True,), None, 2.0, (2.0,), "x", (*shape, 1)),
        "weight": draw(tensors(near(draw, shape), of_parameters)) if draw(st.booleans()) else None,
        "bias": draw(tensors(near(draw, shape), of_parameters)) if draw(st.booleans()) else None,
        "eps": rarely(draw, draw(st.sampled_from([1e-5, 1e-3, 1])), "x", None),
        "residual": draw(tensors(near(draw, (*lead, *shape)), dtype)) if draw(st.booleans()) else None,
        "return_residual": draw(st.booleans()),
    }
    return one_not_a_tensor(draw, arguments, "input", "weight", "bias", "residual")


def reference(input, normalized_shape, weight, bias, eps, residual, return_residual):
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else normalized_shape
    total = input if residual is None else input + residual
    if weight is None and bias is not None and bias.dtype == torch.float32:  # torch has no gradient for this
        y = torch.nn.functional.layer_norm(total.float(), shape, None, bias, eps).to(total.dtype)
    else:
        y = torch.nn.functional.layer_norm(total, shape, weight, bias, eps)
    return (y, total) if return_residual else y


REFUSED = [
    "residual must be floating-point, of input's shape",  # torch would broadcast it
    "residual must be a tensor", "input must be a tensor", "input must hold floating-point",  # and take numbers
    "must have the dtype of input + residual",  # and does not look at what is empty
]  # fmt: skip
test_any_call = explores("layer_norm", calls, reference, refused=REFUSED)
