"""Calls that an op must refuse, as each op's own file lists them."""

import pytest

from primer_fast import functional as F


def refuses(op, wrong):
    """A test. wrong: kind of error, what its message says after the op's name, arguments, named arguments."""

    @pytest.mark.parametrize("error, message, args, options", wrong, ids=[w[1] for w in wrong])
    def test(error, message, args, options):
        with pytest.raises(error, match=f"^{op}: .*{message}"):
            getattr(F, op)(*args, **options)

    return test
