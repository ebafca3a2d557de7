import torch
from hypothesis import strategies as st
from properties.calls import FLOATS, explores, near, not_a_tensor, rarely, tensors
from properties.test_conv2d import WRONG_PAIRS, pairs


@st.composite
def calls(draw, path):
    many = path == "plain"
    side = st.integers(1, 12) if many else st.integers(1, 6)
    image = (draw(side), draw(side))
    shape = (*draw(st.sampled_from([(), (1,), (2,), (3,), (0,)])), draw(st.sampled_from([1, 2, 5, 17])), *image)
    dtype = rarely(draw, draw(st.sampled_from(FLOATS[path])), torch.int64, torch.uint8, torch.bool, torch.complex64)
    values = draw(st.sampled_from(["normal", "integers", "special"]))
    if not dtype.is_floating_point:
        values = (0, 2)
    kernel = draw(pairs(st.integers(1, 4)))
    return {
        "input": not_a_tensor(draw, draw(tensors(near(draw, shape), dtype, values))),
        "kernel_size": rarely(draw, kernel, *WRONG_PAIRS),
        "stride": rarely(draw, draw(st.one_of(st.none(), pairs(st.integers(1, 4)))), *WRONG_PAIRS),
        "padding": rarely(draw, draw(pairs(st.sampled_from([0, 0, 1, 2]))), *WRONG_PAIRS),
        "dilation": rarely(draw, draw(pairs(st.sampled_from([1, 1, 2, 3]))), *WRONG_PAIRS),
        "ceil_mode": rarely(draw, draw(st.booleans()), None, 1, "yes"),
        "return_indices": rarely(draw, draw(st.booleans()), None, 1, "yes"),
    }


def reference(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices):
    def pool(x):
        return torch.nn.functional.max_pool2d(
            x, kernel_size, stride, padding, dilation, ceil_mode=ceil_mode, return_indices=return_indices
        )

    if dilation in (1, (1, 1), [1, 1], (1,)) or not input.requires_grad:
        return pool(input)
    found = pool(input.detach())  # torch's gradient of a window past the image is not in the image
    y, *indices = found if return_indices else (found,)
    stride = kernel_size if stride is None or stride == () else stride
    y = winners(
        input, y, *(tuple(n) * 2 if len(n) == 1 else n for n in map(several, (kernel_size, stride, padding, dilation)))
    )
    return (y, *indices) if return_indices else y


def several(n):
    return (n, n) if isinstance(n, int) else n


def winners(x, y, kernel, stride, padding, dilation):
    """The largest element of each window by the definition: the last NaN, else the first of the largest."""
    places, inside = [], []
    for axis in range(2):
        starts = torch.arange(y.shape[axis - 2], device=x.device)[:, None] * stride[axis] - padding[axis]
        taps = starts + torch.arange(kernel[axis], device=x.device) * dilation[axis]
        inside.append((taps >= 0) & (taps < x.shape[axis - 2]))
        places.append(taps.clamp(0, x.shape[axis - 2] - 1))
    windows = x[..., places[0][:, None, :, None], places[1][None, :, None, :]].flatten(-2)
    there = (inside[0][:, None, :, None] & inside[1][None, :, None, :]).flatten(-2)
    windows = windows.masked_fill(~there, -torch.inf)
    order = torch.arange(windows.shape[-1], device=x.device)
    largest = windows.detach().masked_fill(~there, -torch.inf)
    first = torch.where((largest == largest.amax(-1, keepdim=True)) & there, len(order) - order, 0).argmax(-1)
    last_nan = torch.where(largest.isnan(), order + 1, 0)
    chosen = torch.where(last_nan.any(-1), last_nan.argmax(-1), first)
    return windows.gather(-1, chosen[..., None])[..., 0]


test_any_call = explores("max_pool2d", calls, reference, of_kernels=4)
