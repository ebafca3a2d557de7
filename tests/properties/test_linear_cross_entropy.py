import torch
from hypothesis import strategies as st
from properties.calls import explores, rarely
from properties.test_linear_log_prob import REFUSED, of_a_head


@st.composite
def calls(draw, path):
    return of_a_head(draw, path) | {
        "reduction": rarely(draw, draw(st.sampled_from(["mean", "sum", "none"])), "max", None, 1),
        "ignore_index": rarely(draw, draw(st.sampled_from([-100, 0, 1, -1])), 1.0, "x", True),
        "label_smoothing": rarely(draw, draw(st.sampled_from([0.0, 0.1, 1.0])), -0.1, 1.1, "x", None),
    }


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


test_any_call = explores("linear_cross_entropy", calls, reference, of_kernels=4, refused=REFUSED)
