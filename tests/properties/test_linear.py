import torch
from hypothesis import strategies as st
from properties.calls import FLOATS, SIZES, explores, near, one_not_a_tensor, rarely, tensors

from primer_fast.functional.activation import ACTIVATIONS

FUNCTION = {None: lambda z: z, **{name: a.module() for name, a in ACTIVATIONS.items()}}


@st.composite
def calls(draw, path):
    size = st.sampled_from(SIZES[path])
    k, n = draw(size), draw(size)
    dtype = draw(st.sampled_from(FLOATS[path]))
    lead = draw(st.lists(size, max_size=2))
    weight = draw(st.sampled_from([(n, k), (n, k), (n, k), (k,)]))
    arguments = {
        "input": draw(tensors((*lead, k), dtype)),
        "weight": draw(tensors(near(draw, weight), rarely(draw, dtype, torch.float32, torch.int64, torch.complex64))),
        "bias": None,
        "activation": rarely(draw, draw(st.sampled_from([None, *ACTIVATIONS])), "swish", 3, torch.relu, ["relu"]),
    }
    if draw(st.booleans()):
        arguments["bias"] = draw(tensors(near(draw, weight[:-1]), rarely(draw, dtype, torch.float32, torch.int32)))
    return one_not_a_tensor(draw, arguments, "input", "weight", "bias")


def reference(input, weight, bias=None, *, activation=None):
    if weight.dim() == 1 and bias is not None:  # torch takes this for some inputs alone
        if bias.numel() != 1:
            raise ValueError("a number")
        return FUNCTION[activation](torch.nn.functional.linear(input, weight) + bias.reshape(()))
    return FUNCTION[activation](torch.nn.functional.linear(input, weight, bias))


REFUSED = ["bias must have one element per row", "must have one dtype"]  # torch broadcasts and converts some
test_any_call = explores("linear", calls, reference, of_kernels=4, refused=REFUSED)
