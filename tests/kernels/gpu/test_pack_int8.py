"""Numbers of a line and back, against `formats/int8.py`."""

from __future__ import annotations

import pytest

from sparda_compile.kernels.gpu import pack_int8


@pytest.mark.parametrize("axis", [0, 1], ids=["keys", "values"])
def test_every_code_and_every_rounding_is_that_of_the_format(check_codes, axis):
    check_codes("int8", pack_int8, axis)
