import math

import torch
from hypothesis import strategies as st
from properties.calls import FLOATS, SIZES, explores, near, not_a_tensor, rarely, tensors
from properties.test_linear import FUNCTION


@st.composite
def calls(draw, path):
    size = st.sampled_from(SIZES[path])
    widths = draw(st.lists(size, min_size=2, max_size=4))
    dtype = draw(st.sampled_from(FLOATS[path]))
    lead = draw(st.lists(size, max_size=2))
    arguments = {"input": not_a_tensor(draw, draw(tensors((*lead, widths[0]), dtype)))}
    biased = draw(st.booleans())
    for i, n in enumerate(widths[1:]):
        weight = draw(tensors(near(draw, (n, widths[i])), rarely(draw, dtype, torch.float32, torch.int64)))
        arguments[f"weights.{i}"] = not_a_tensor(draw, weight)
        if biased:
            arguments[f"biases.{i}"] = draw(tensors(near(draw, (n,)), rarely(draw, dtype, torch.float32)))
    names = st.sampled_from([None, *FUNCTION])
    arguments["activation"] = rarely(draw, draw(names), "swish", 3, torch.relu, ["relu"])
    arguments["output_activation"] = rarely(draw, draw(names), "swish", 3)
    return arguments


def reference(input, weights, biases=None, *, activation, output_activation):
    FUNCTION[activation]  # a name that one layer has no use for is refused, too
    acts = [activation] * (len(weights) - 1) + [output_activation]
    for i, (weight, act) in enumerate(zip(weights, acts, strict=True)):
        if weight.dim() != 2:
            raise ValueError("a weight of a layer has two axes")
        bias = None if biases is None else biases[i]
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError("a bias does not broadcast")
        input = FUNCTION[act](torch.nn.functional.linear(input, weight, bias))
    return input


def terms(arguments):
    """Sums of each layer are multiplied by those of the next."""
    shapes = [getattr(v, "shape", ()) for k, v in arguments.items() if k == "input" or k.startswith("weights")]
    return 10 * max(1, math.prod(n for shape in shapes for n in shape[-1:]))


# torch converts some dtypes
test_any_call = explores("mlp", calls, reference, terms=terms, refused=["must have one dtype"])
