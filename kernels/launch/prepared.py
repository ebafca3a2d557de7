"""Launchers prepared once for each kind of call: shapes, strides, dtypes, devices, alignment and options.

``@prepared(n)`` is for functions of n tensors (or None) and options. The first call of a kind runs the function. The
second runs it too and records what it does (recording.py), of which plan.py makes a plan. From the third call on, that
plan runs: no check, no choice of settings, no look at an argument beyond its kind. A kind that comes once costs nothing
but its key.

``function.known(...)`` gives the plan for such a call, or None. A caller that checks its arguments before it calls the
function need not check those of a known kind: others like them have passed.

Such a function must depend on its arguments alone, and not on what tensors hold, and may call no other prepared one:
the plan of that would launch what no recording sees. What else settings depend on, as the
GPU and the tuned files, calls ``forget()`` where it changes. Plans know the driver that they were made with. Where a
hook watches launches, and in ``unprepared()``, the functions run as they are.
"""

import contextlib
import functools
import threading
from collections.abc import Callable

import torch
import triton

from .direct import observed
from .plan import plan_of
from .recording import NotRepeatable, Recording

LIMIT = 1024  # plans of a function; the oldest goes first
_PLAIN = (torch.Tensor, torch.nn.Parameter, type(None))  # types of arguments that plans are made for
_functions: list["_Prepared"] = []
_paused = 0


def prepared(tensors: int) -> Callable:
    """Decorator of a function of so many tensors, any of them but the first may be None, and options, by position.

    Options must be hashable, and equal ones must mean the same.
    """
    return lambda fn: functools.wraps(fn)(_Prepared(fn, tensors).call)


def forget() -> None:
    """Drop all plans: something that they rest on has changed."""
    for function in _functions:
        function.forget()


@contextlib.contextmanager
def unprepared():
    """Inside, prepared functions run as they are, in all threads."""
    global _paused
    _paused += 1
    forget()
    try:
        yield
    finally:
        _paused -= 1


class _Prepared:
    def __init__(self, fn: Callable, tensors: int):
        self.fn, self.tensors = fn, tensors
        self.plans: dict[tuple, Callable] = {}
        self.seen: dict[tuple, None] = {}
        self.era, self.lock = 0, threading.Lock()  # how often plans were dropped
        self.call = self._call()
        _functions.append(self)

    def _call(self) -> Callable:
        """The function that looks for a plan; written out, as a loop over tensors would take longer than a launch."""
        names = [f"a{i}" for i in range(self.tensors)]
        kinds = [f"type({a}), {a}.shape, {a}.stride(), {a}.dtype, {a}.device, {a}.data_ptr() & 15" for a in names]
        kinds[1:] = [f"None if {a} is None else ({kind})" for a, kind in zip(names[1:], kinds[1:], strict=True)]
        tensors, key = ", ".join(names), f"(options, {', '.join(kinds)})"
        source = f"""
def known({tensors}, *options):
    try:
        return plans.get({key})
    except (AttributeError, TypeError, RuntimeError):  # no tensor, or one without memory; an option without a hash
        return None

def call({tensors}, *options):
    key = {key}
    plan = plans.get(key)
    return miss(key, ({tensors},), options) if plan is None else plan({tensors})
"""
        space = {"plans": self.plans, "miss": self._miss}
        exec(compile(source, "<prepared>", "exec"), space)
        space["call"].known = space["known"]
        return space["call"]

    def _miss(self, key: tuple, tensors: tuple, options: tuple):
        if _paused or observed() or any(type(t) not in _PLAIN for t in tensors):
            return self.fn(*tensors, *options)
        if key not in self.seen:
            with self.lock:
                _make_room(self.seen)
                self.seen[key] = None
            return self.fn(*tensors, *options)
        era = self.era
        with Recording(tensors) as recording:
            result = self.fn(*recording.arguments, *options)
        plan = self._plan(recording, result, tensors[0], options)
        with self.lock:
            if era == self.era:  # otherwise another thread has forgotten, meanwhile, what this plan rests on
                _make_room(self.plans)
                self.plans[key] = plan
        return _given_back(result, recording, tensors)

    def _plan(self, recording: Recording, result, first, options: tuple) -> Callable:
        def as_it_is(*tensors):
            return self.fn(*tensors, *options)

        driver, device = None, -1
        if not triton.knobs.runtime.interpret:
            driver = triton.runtime.driver.active
            device = first.get_device() if first.is_cuda else driver.get_current_device()

        def otherwise(*tensors):
            if triton.runtime.driver.active is not driver:
                forget()
            elif first_is_cuda and torch.cuda.current_device() != device and not observed():
                with torch.cuda.device(device):
                    return plan(*tensors)
            return as_it_is(*tensors)

        first_is_cuda = first.is_cuda
        try:
            plan = plan_of(recording, result, driver, device, otherwise)
        except NotRepeatable:
            return as_it_is
        return plan

    def forget(self) -> None:
        with self.lock:
            self.era += 1
            self.plans.clear()
            self.seen.clear()


def _make_room(kinds: dict) -> None:
    while len(kinds) >= LIMIT:
        del kinds[next(iter(kinds))]


def _given_back(result, recording: Recording, tensors: tuple):
    """A result in which the recording's arguments are the call's."""
    if isinstance(result, torch.Tensor):
        return next((t for t, own in zip(tensors, recording.arguments, strict=True) if own is result), result)
    if isinstance(result, tuple | list):
        return type(result)(_given_back(r, recording, tensors) for r in result)
    return result
