"""Tensor descriptors are checked by the interpreter, and everywhere under PRIMER_FAST_CHECK_DESCRIPTORS=1."""

import json

import pytest
import torch
from compiling import printed_where_kernels_compile

from primer_fast.kernels.launch.descriptor import tensor_descriptor

BAD = [  # what changes in a descriptor that is right
    ("on a 16-byte boundary", {"base": torch.empty(64, 80)[:, 1:65]}),
    ("1 to 5 axes", {"shape": [], "strides": [], "block_shape": []}),
    ("1 to 5 axes", {"shape": [2] * 6, "strides": [64] * 5 + [1], "block_shape": [16] * 6}),
    ("of one length", {"strides": [1]}),
    ("of one length", {"block_shape": [16]}),
    ("size must be from 1", {"shape": [0, 64]}),
    ("size must be from 1", {"shape": [64, 2**32]}),
    ("adjacent", {"strides": [80, 2]}),
    ("positive", {"strides": [0, 1]}),
    ("positive", {"strides": [-80, 1]}),
    ("multiple of 16 bytes", {"strides": [81, 1]}),
    (r"below 2\^40 bytes", {"strides": [2**38, 1]}),
    ("power of 2, at most 256", {"block_shape": [512, 16]}),
    ("power of 2, at most 256", {"block_shape": [16, 48]}),
    ("at least 16 bytes", {"block_shape": [16, 2]}),
]


def right():
    base = torch.empty(64, 80)
    return {"base": base, "shape": [64, 64], "strides": [80, 1], "block_shape": [16, 32]}


@pytest.mark.parametrize("rule, change", BAD, ids=[f"{rule}-{i}" for i, (rule, _) in enumerate(BAD)])
def test_a_bad_descriptor_is_refused(rule, change, monkeypatch):
    monkeypatch.setattr("primer_fast.kernels.launch.descriptor._checking", True)
    assert tensor_descriptor(**right()).block_shape == [16, 32]
    with pytest.raises(ValueError, match=rf"tensor_descriptor: .*{rule}.*of shape"):
        tensor_descriptor(**right() | change)


PROBE = """
import collections, importlib, json, os, torch

os.environ.pop("PRIMER_FAST_CHECK_DESCRIPTORS", None)
from primer_fast.kernels.launch import descriptor

wrong = torch.empty(4, 4), [4, 4], [3, 1], [4, 4]
descriptor.tensor_descriptor(*wrong)  # without the switch nothing is checked: it costs a launch more than all else
os.environ["PRIMER_FAST_CHECK_DESCRIPTORS"] = "1"
importlib.reload(descriptor)
from primer_fast.proof.production import compiled_launches, cases_to_compile

checked, check = collections.Counter(), descriptor.check
def counted(base, shape, *rest):
    checked[len(shape)] += 1
    check(base, shape, *rest)
descriptor.check = counted
try:
    descriptor.tensor_descriptor(*wrong)
    refused = None
except ValueError as error:
    refused = str(error)
checked.clear()
errors = []
for unit in cases_to_compile((), (), (), ("sm_90",)):
    error = compiled_launches(unit, wanted=lambda kernel: False)[2]  # all but the compiler
    if error != "no kernel was launched":
        errors.append([unit.op, str(unit.case), unit.dtype, error])
print(json.dumps({"refused": refused, "checked": checked, "errors": errors}))
"""


def test_no_launcher_makes_a_bad_one():
    """In no case of production size."""
    seen = json.loads(printed_where_kernels_compile("-c", PROBE))
    assert seen["errors"] == [] and "multiple of 16 bytes" in seen["refused"]
    assert set(seen["checked"]) == {"2", "4", "5"}, "linear and weights of conv2d, attention, boxes of conv2d"
