import torch
from hypothesis import strategies as st
from properties.calls import FLOATS, explores, near, one_not_a_tensor, rarely, tensors
from properties.test_linear import FUNCTION


@st.composite
def pairs(draw, numbers):
    """An int, or one or two of them in a tuple or list."""
    one, two = draw(numbers), draw(numbers)
    return draw(st.sampled_from([one, one, (one, two), [one, two], (one,)]))


WRONG_PAIRS = (0, -1, (1, 2, 3), (), True, 1.5, "x", None, (1, 0), (1, -1), (1, 1.0), 10**6, [1, None])


@st.composite
def calls(draw, path):
    many = path == "plain"
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    channels, out = groups * draw(st.integers(1, 5 if many else 3)), groups * draw(st.integers(1, 5 if many else 3))
    side = st.integers(1, 12) if many else st.integers(1, 6)
    image = (draw(side), draw(side))
    kernel = tuple(draw(st.integers(1, min(3, n))) for n in image)
    batch = draw(st.sampled_from([(), (1,), (2,), (3,), (0,)]))
    dtype = draw(st.sampled_from(FLOATS[path]))
    arguments = {
        "input": draw(tensors(near(draw, (*batch, channels, *image)), dtype)),
        "weight": draw(tensors(near(draw, (out, channels // groups, *kernel)), rarely(draw, dtype, torch.float32))),
        "bias": draw(tensors(near(draw, (out,)), dtype)) if draw(st.booleans()) else None,
        "stride": rarely(draw, draw(pairs(st.integers(1, 3))), *WRONG_PAIRS),
        "padding": rarely(
            draw, draw(st.one_of(pairs(st.integers(0, 3)), st.sampled_from(["same", "valid"]))), *WRONG_PAIRS, "Same"
        ),
        "dilation": rarely(draw, draw(pairs(st.sampled_from([1, 1, 1, 2, 3]))), *WRONG_PAIRS),
        "groups": rarely(draw, groups, 0, -1, 2, 4, 1.0, None, True, "1"),
        "activation": rarely(draw, draw(st.sampled_from([None, None, *FUNCTION])), "swish"),
    }
    return one_not_a_tensor(draw, arguments, "input", "weight", "bias")


def reference(input, weight, bias, stride, padding, dilation, groups, activation):
    y = torch.nn.functional.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return FUNCTION[activation](y)


# torch takes some dtypes that differ where a tensor is empty
test_any_call = explores("conv2d", calls, reference, refused=["must have one dtype"])
