"""How an op and its gradient reach whoever asks: an eager call, a compiler, an exported program, a fake tensor.

``@operator(name)`` registers a launcher as ``torch.ops.primer_fast.<name>``. Its annotations are the schema, and its
fake implementation says which shapes, dtypes and strides the results have. ``differentiable`` gives such an operator
its gradient, by one ``setup`` and one ``backward``, and makes of these two an autograd.Function for eager calls: the
way through torch.library takes tens of microseconds.

Operators take arguments as the public functions pass them, and check nothing themselves. What a forward keeps for its
backward are results beside the first; ``keep`` says whether to keep it. A backward returns the gradients that
``needed`` asks for. The float32 matmul precision is read when a kernel is launched, not when the graph is made, as
torch's own products do.
"""

__all__ = [
    "Operator",
    "absent",
    "as_rows",
    "check_kept",
    "differentiable",
    "differentiates",
    "eager",
    "gradients_of",
    "like_rows_of",
    "needs_operator",
    "operator",
    "spread",
]

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _has_storage, _len_torch_dispatch_stack
from torch.autograd import forward_ad

from primer_fast.backend import EAGER, tangents


def needs_operator(*tensors: Tensor | None) -> bool:
    """True where a call must be one operator of torch.library: torch.compile or torch.export traces it, a dispatch mode
    looks on, or a tensor is of a subclass, a fake one for example. Costs eager calls 0.3 us.
    """
    return torch.compiler.is_compiling() or _len_torch_dispatch_stack() > 0 or not EAGER.issuperset(map(type, tensors))


class Operator:
    """A function that is one operator of torch.library where a call must be one; see ``needs_operator``.

    The function's leading parameters are tensors or None. It may return None among its results, or one tensor twice;
    the operator may not, and there a tensor without elements stands in. Of a function whose last parameter is
    ``needed`` the operator returns the results that are needed, and calls give all of them, None for the others.

    The operator raises NotImplementedError where an argument has a tangent: it would give a result without one.
    """

    def __init__(self, name: str, function: Callable):
        signature = inspect.signature(function)
        kinds = [parameter.annotation for parameter in signature.parameters.values()]
        self.name, self.function, self.parameters = name, function, tuple(signature.parameters)
        self.tensors = next((i for i, kind in enumerate(kinds) if kind not in (Tensor, Tensor | None)), len(kinds))
        self.has_one_result = signature.return_annotation is Tensor
        self.selects = self.parameters[-1] == "needed"

        @functools.wraps(function)
        def run(*args):
            if tangents():
                _refuse_tangents(name, args)
            return self._as_tensors(function(*args), args)

        self.registered = torch.library.custom_op(f"primer_fast::{name}", mutates_args=())(run)

    def register_fake(self, fake: Callable) -> None:
        """Decorator: the function makes results without values; it too may return what is not needed, and None."""
        self.registered.register_fake(lambda *args: self._as_tensors(fake(*args), args))

    def __call__(self, *args):
        if not needs_operator(*args[: self.tensors]):
            return self.function(*args)
        results = self.registered(*args)
        return spread(results, args[-1]) if self.selects else results

    def _as_tensors(self, results: Any, args: Sequence) -> Any:
        if self.has_one_result:
            return results
        if self.selects:
            return [t for t, need in zip(results, args[-1], strict=True) if need]
        shown = [
            absent(results[0]) if t is None or any(t is other for other in results[:i]) else t
            for i, t in enumerate(results)
        ]
        return shown if isinstance(results, list) else tuple(shown)


def operator(name: str) -> Callable[[Callable], Operator]:
    """Decorator: the function becomes the operator primer_fast::name; its annotations are the schema."""
    return functools.partial(Operator, name)


def differentiable(
    op: Operator, setup: Callable, backward: Callable, leading: int, chosen: Callable | None = None, zeros: bool = False
) -> tuple[Callable, Callable]:
    """Give the operator its gradient, and eager calls the same.

    Args:
        setup: ``setup(ctx, inputs, output)`` keeps in ctx what the backward needs. The inputs are the operator's; the
            output is what the operator, or its function, returns.
        backward: ``backward(ctx, *grads)``, of an upstream gradient for each result -> the gradients of the ``leading``
            inputs, None for those that have none.
        chosen: ``chosen(inputs, output)`` -> what of the output a call returns, one tensor or a tuple; the rest is kept
            for the backward alone. None: the first, or all where it is one tensor.
        zeros: whether the upstream gradient of a result that is not used is zeros; else it is None.

    Returns:
        ``call(keep, *inputs)`` -> what is chosen; keep: whether there will be a backward.
        ``apply(*leading_inputs, rest, run)`` -> the same in an eager call whose gradient will be asked for. ``rest`` is
        the tuple of the other inputs; ``run`` is a function of the tensors among the inputs, and does what the
        operator does for the inputs that are none.
    """
    tensors, function, registered = op.tensors, op.function, op.registered
    keep_at = op.parameters.index("keep") if "keep" in op.parameters else None
    nothing = (None,) * (len(op.parameters) - leading)

    def of(inputs, output):
        if op.has_one_result:
            return output
        return output[0] if chosen is None else chosen(inputs, output)

    def setup_of_operator(ctx, inputs, output):
        if keep_at is not None:
            check_kept(op.name, inputs[keep_at])
        ctx.set_materialize_grads(zeros)
        shown, outputs = of(inputs, output), (output,) if op.has_one_result else output
        shown = shown if isinstance(shown, tuple) else (shown,)
        ctx.places = [i for i, t in enumerate(outputs) if any(t is other for other in shown)]
        ctx.mark_non_differentiable(*(t for i, t in enumerate(outputs) if i not in ctx.places))
        setup(ctx, inputs, output)

    def backward_of_operator(ctx, *grads):
        return *backward(ctx, *(grads[i] for i in ctx.places)), *nothing

    registered.register_autograd(backward_of_operator, setup_context=setup_of_operator)
    apply = eager(op.name, setup, backward, leading, tensors, of if op.has_one_result else chosen)

    def call(keep, *inputs):
        if needs_operator(*inputs[:tensors]):
            return of(inputs, registered(*inputs))
        if keep:
            return apply(*inputs[:leading], inputs[leading:], lambda *given: function(*given, *inputs[tensors:]))
        return of(inputs, function(*inputs))

    return call, apply


def eager(
    name: str, setup: Callable, backward: Callable, leading: int, tensors: int, chosen: Callable | None = None
) -> Callable:
    """``apply`` of ``differentiable``, for what is no operator too. tensors: how many the first inputs are."""
    first = [f"a{i}" for i in range(leading)]
    given = [*first, *(f"rest[{i}]" for i in range(tensors - leading))]
    # Written out, as a loop over the inputs takes a microsecond. The setup is called here, which is quick; where torch
    # calls a setup_context, that alone takes 45 us.
    source = f"""
def forward(ctx, {", ".join(first)}, rest, run):
    output = run({", ".join(given)})
    inputs = ({", ".join(first)}, *rest)
    setup(ctx, inputs, output)
    return {"output[0]" if chosen is None else "chosen(inputs, output)"}

def whole_backward(ctx, *grads):
    return *backward(ctx, *grads), None, None
"""
    space: dict[str, Any] = {"setup": setup, "backward": backward, "chosen": chosen}
    exec(compile(source, f"<{name}>", "exec"), space)
    members = {"forward": staticmethod(space["forward"]), "backward": staticmethod(space["whole_backward"])}
    function = type(name, (torch.autograd.Function,), members)
    # Without the look at functorch's transforms that the function's own begins with.
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def differentiates(upstream: Tensor | None, other: Tensor | None = None) -> bool:
    """Whether what a backward computes is itself differentiated, or mapped as by ``is_grads_batched``: then PyTorch's
    operators compute it. A gradient that stands for several has no memory of its own.
    """
    if is_grad_enabled() or forward_ad._current_level >= 0:
        return True
    return not ((upstream is None or _has_storage(upstream)) and (other is None or _has_storage(other)))


def gradients_of(function: Callable, inputs: Sequence, needed: Sequence[bool], upstream: Any) -> list[Tensor | None]:
    """The gradients of ``function()`` by PyTorch's operators, None for each input that needs none.

    With create_graph=True they have gradients themselves; tangents and batches are carried on.
    """
    asked = [t for t, need in zip(inputs, needed, strict=True) if need]
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():  # retain_graph: an input may be an output of the node that this is the backward of
        found = torch.autograd.grad(function(), asked, upstream, retain_graph=True, create_graph=create_graph)
    return spread(found, needed)


def absent(like: Tensor) -> Tensor:
    """Stands for None among the results of an operator, which must all be tensors."""
    return like.new_empty(0)


def spread(found: Iterable[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    """The results that are needed -> one for each place, None where it was not needed."""
    rest = iter(found)
    return [next(rest) if need else None for need in needed]


def as_rows(t: Tensor) -> Tensor:
    """(..., n) -> (M, n)"""
    return t if t.dim() == 2 else t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def like_rows_of(x: Tensor, *results: Tensor | None) -> tuple:
    """(M, n) -> with the leading axes of ``x``; None stays None, and what is one tensor stays one."""
    if x.dim() == 2:
        return results
    views = {id(t): t.view(*x.shape[:-1], t.shape[-1]) for t in results if t is not None}
    return tuple(None if t is None else views[id(t)] for t in results)


def check_kept(name: str, keep: bool) -> None:
    """Raise ValueError where a gradient will be asked of a call that kept nothing for it."""
    if not keep:
        raise ValueError(f"{name}: keep must be True where an argument requires a gradient; got {keep}")


def _refuse_tangents(name: str, args: tuple) -> None:
    given = [t for a in args for t in (a if isinstance(a, list | tuple) else (a,)) if isinstance(t, Tensor)]
    if any(forward_ad.unpack_dual(t).tangent is not None for t in given if t.is_floating_point()):
        raise NotImplementedError(
            f"primer_fast::{name}: tensors must have no tangent, the operator has no forward derivative; "
            f"call primer_fast.functional, uncompiled"
        )
