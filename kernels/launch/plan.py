"""A recording made into a function: the same steps for other tensors of the same kinds, and nothing else.

The function is written as Python source, in which all that cannot change is a constant: a launch is one call with the
pointers put in. ``plan.source`` shows it.
"""

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .direct import Descriptor, call_of, stream_for
from .recording import Allocation, Launch, Memory, NotRepeatable, Operator, Recording

_INDENT = "    "

# torch.empty_strided past torch's dispatcher, on the current device, as code from torch.compile has it: half the time
_guards = getattr(torch._C._dynamo, "guards", None)
_EMPTY = {device: getattr(_guards, f"_empty_strided_{device}", None) for device in ("cpu", "cuda")}


def plan_of(recording: Recording, result, driver, device: int, otherwise):
    """A function of the recording's arguments that returns what the recorded call returned, ``result``.

    driver: Triton's, with which it was recorded; None for the interpreter. device: on which the kernels run.
    otherwise: what to call with the same arguments where Triton has to launch itself.

    Raises:
        NotRepeatable: another call with the same kinds of arguments may need other steps.
    """
    if not recording.repeatable:
        raise NotRepeatable("an operator whose result's shape or whose successor depends on numbers")
    writer = _Writer(recording, result)
    if driver is not None:
        if any(step.compiled is None for step in recording.steps if isinstance(step, Launch)):
            raise NotRepeatable("a kernel that was not compiled")
        writer.guard(driver, device, otherwise)  # where nothing is launched too: memory is taken on the current device
    return writer.function()


class _Writer:
    """Writes the lines of a plan: expressions for values, then a line or more for each step."""

    def __init__(self, recording: Recording, result):
        self.recording, self.result = recording, result
        self.lines: list[str] = []
        self.constants: dict[str, object] = {}  # which keeps them alive, and so their ids
        self.names_of: dict[int, str] = {}
        self.pointers: set[str] = set()  # memories whose address is in a variable
        self.names = [f"a{i}" for i in range(len(recording.arguments))]
        self.used, self.forms = self._last_uses(), self._forms()
        self.direct = False

    def _last_uses(self) -> dict[str, int]:
        """Name of a memory -> the last step that reads it."""
        last = {}
        for i, step in enumerate(self.recording.steps):
            if isinstance(step, Allocation):
                continue
            for t in _tensors((step.args, step.kwargs)):
                last[self.recording.memory_of(t).name] = i
        for t in _tensors(self.result):
            last[self.recording.memory_of(t).name] = len(self.recording.steps)
        return last

    def constant(self, value) -> str:
        known = self.names_of.get(id(value))
        if known is None:
            known = self.names_of[id(value)] = f"c{len(self.constants)}"
            self.constants[known] = value
        return known

    def expression(self, value, tensor) -> str:
        """Source of a value, with ``tensor(t)`` for tensors in it."""
        if isinstance(value, Tensor):
            return tensor(value)
        if value is None or type(value) in (bool, int, str):
            return repr(value)
        if type(value) in (tuple, list):
            inner = "".join(f"{self.expression(v, tensor)}, " for v in value)
            return f"({inner})" if type(value) is tuple else f"[{inner}]"
        if next(_tensors(value), None) is not None:
            raise NotRepeatable(f"tensors within a {type(value).__name__}")
        return self.constant(value)

    def view(self, t: Tensor) -> str:
        """Source of a tensor: a memory, or a view of it."""
        memory = self.recording.memory_of(t)
        name, whole = memory.name, memory.tensor
        if t.dtype != whole.dtype:
            raise NotRepeatable("a view of another dtype")
        start = t.storage_offset() - whole.storage_offset()
        if start == 0 and _form(t) == self.forms.get(name, _form(whole)):
            return name
        offset = f"{name}.storage_offset() + {start}" if name in self.names else str(t.storage_offset())
        return f"{name}.as_strided({tuple(t.shape)}, {t.stride()}, {offset})"

    def pointer(self, t: Tensor) -> str:
        """Source of an address; the line that asks for it is written where it is the first."""
        memory = self.recording.memory_of(t)
        name, whole = f"p_{memory.name}", memory.tensor
        if name not in self.pointers:
            self.pointers.add(name)
            self.lines.append(f"{name} = {memory.name}.data_ptr()")
        offset = t.storage_offset() * t.element_size() - whole.storage_offset() * whole.element_size()
        return f"{name} + {offset}" if offset else name

    def guard(self, driver, device: int, otherwise) -> None:
        self.direct = True
        self.constants |= {"stream_for": stream_for, "driver": driver, "otherwise": otherwise}
        self.lines += [
            f"stream = stream_for(driver, {device})",
            "if stream is None:",
            f"{_INDENT}return otherwise({', '.join(self.names)})",
        ]

    def allocate(self, memory: Memory) -> None:
        t, form = memory.tensor, self.forms[memory.name]
        filled = torch.are_deterministic_algorithms_enabled()  # then torch.empty_strided fills what it returns
        empty = None if filled else _EMPTY.get(t.device.type)
        more = [self.constant(t.dtype)]
        if empty is None:
            empty, more = torch.empty_strided, [f"dtype={more[0]}", f"device={self.constant(t.device)}"]
        self.lines.append(f"{memory.name} = {self.constant(empty)}({', '.join([*map(str, form), *more])})")

    def operate(self, step: Operator) -> None:
        arguments = [self.expression(a, self.view) for a in step.args]
        arguments += [f"{name}={self.expression(a, self.view)}" for name, a in step.kwargs.items()]
        call = f"{self.constant(step.function)}({', '.join(arguments)})"
        names = ["_" if m is None else m.name for m in step.results]
        self.lines.append(f"{names[0] if step.single else '(' + ', '.join(names) + ',)'} = {call}")

    def launch(self, step: Launch) -> None:
        call = call_of(step.compiled) if self.direct else None
        if call is None:
            self._start(step)
            return
        kernel = step.kernel
        self.constant(step.compiled)  # keeps it: Triton 3.8 and later unload a kernel that nothing refers to
        own = {name: value for name, value in step.kwargs.items() if name in kernel.signature.parameters}
        bound = kernel.signature.bind(*step.args, **own)
        bound.apply_defaults()
        arguments, descriptors = [], 0
        for value in bound.arguments.values():
            if isinstance(value, TensorDescriptor):
                arguments += self._described(value, step.compiled, descriptors)
                descriptors += 1
            else:
                arguments.append(self.expression(value, self.pointer))
        grid = [*step.grid, 1, 1][:3]
        constants = [self.constant(value) for value in call.before]
        values = ", ".join(arguments)
        values = f"({values},)" if call.packed else values
        places = ", ".join([*map(str, grid), "stream", *constants])
        self.lines.append(f"{self.constant(call.function)}({places}, {values})")

    def _described(self, value: TensorDescriptor, compiled, index: int) -> list[str]:
        descriptor = Descriptor(value, compiled, index)
        pointer = self.pointer(value.base)
        found = f"m{len(self.lines)}"
        self.lines += [
            f"{found} = {self.constant(descriptor.maps)}.get({pointer})",
            f"if {found} is None:",
            f"{_INDENT}{found} = {self.constant(descriptor.map)}({pointer})",
        ]
        return [found, *map(str, descriptor.sizes)]

    def _start(self, step: Launch) -> None:
        """A launch through Triton."""

        def value(v):
            if not isinstance(v, TensorDescriptor):
                return self.expression(v, self.view)
            fields = {name: field for name, field in vars(v).items() if name != "base"}
            return f"{self.constant(_descriptor)}({self.view(v.base)}, {self.constant(fields)})"

        arguments = "".join(f"{value(v)}, " for v in step.args)
        named = ", ".join(f"{name!r}: {value(v)}" for name, v in step.kwargs.items())
        start, grid = self.constant(step.kernel.start), self.constant(step.grid)
        self.lines.append(f"{start}({grid}, ({arguments}), {{{named}}})")

    def function(self):
        for i, step in enumerate(self.recording.steps):
            if isinstance(step, Allocation):
                if step.memory.name in self.used:
                    self.allocate(step.memory)
                continue
            (self.operate if isinstance(step, Operator) else self.launch)(step)
            done = [name for name, last in self.used.items() if last == i and name not in self.names]
            if done:
                self.lines.append(f"del {', '.join(done)}")
        self.lines.append(f"return {self.expression(self.result, self.view)}")
        source = f"def plan({', '.join(self.names)}):\n" + "".join(f"{_INDENT}{line}\n" for line in self.lines)
        exec(compile(source, "<plan>", "exec"), self.constants)
        plan = self.constants["plan"]
        plan.source = source
        return plan

    def _forms(self) -> dict[str, tuple]:
        """Name of an allocation -> shape and stride to make it with.

        They are those of what is returned of it, where that is all of it: then no view has to be made.
        """
        steps, memory_of = self.recording.steps, self.recording.memory_of
        forms = {s.memory.name: _form(s.memory.tensor) for s in steps if isinstance(s, Allocation)}
        operated = {memory_of(t).name for s in steps if isinstance(s, Operator) for t in _tensors((s.args, s.kwargs))}
        for t in _tensors(self.result):
            memory = memory_of(t)
            covers = t.numel() == memory.tensor.numel() and t.storage_offset() == memory.tensor.storage_offset()
            if memory.name in forms and memory.name not in operated and covers and _dense(t) and _dense(memory.tensor):
                forms[memory.name] = _form(t)
        return forms


def _form(t: Tensor) -> tuple:
    return tuple(t.shape), t.stride()


def _dense(t: Tensor) -> bool:
    """Whether a tensor has as many elements as its memory."""
    return sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)) == t.numel() - 1


def _tensors(value):
    """All tensors in a value, those that descriptors are of too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, TensorDescriptor):
        yield value.base
    elif isinstance(value, tuple | list):
        for v in value:
            yield from _tensors(v)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _descriptor(base, fields) -> TensorDescriptor:
    made = object.__new__(TensorDescriptor)
    vars(made).update(fields, base=base)
    return made
