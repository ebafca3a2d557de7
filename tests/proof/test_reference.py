"""An op's reference says all of it, or says at once what is missing."""

import dataclasses

import pytest

from primer_fast.reference.ops import OPS


@pytest.mark.parametrize("op", OPS)
def test_gradients_and_magnitudes_are_of_every_array(op):
    """A misspelt name would leave something unchecked."""
    reference = OPS[op]
    arrays = {name for case in reference.cases for name in reference.differentiable(case)}
    assert reference.name == op and arrays and all(case.why for case in reference.cases)
    assert {"forward", "backward"} <= reference.flops(reference.cases[0]).keys()
    assert reference.bytes_moved(reference.cases[0], 2).keys() == {"forward", "backward"}


def test_what_contradicts_itself_is_refused():
    linear = OPS["linear"]
    with pytest.raises(ValueError, match="names of their own; got twice primer_first"):
        dataclasses.replace(linear, cases=(*linear.cases, linear.cases[0]))
    with pytest.raises(ValueError, match="without_gradient must name arrays of its cases; got wieght"):
        dataclasses.replace(linear, without_gradient=("wieght",))
    with pytest.raises(TypeError, match="gradeint"):
        dataclasses.replace(linear, gradeint=linear.gradient)
    with pytest.raises(ValueError, match=r"linear: case must be one of primer_first.*; got 'nothing'"):
        linear.case("nothing")
