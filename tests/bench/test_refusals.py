from __future__ import annotations

import pytest

refusals = pytest.importorskip("sparda_compile.bench.refusals")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ImportError("No module named 'fla'"), "ImportError: No module named 'fla'"),
        (RuntimeError("\n  no such kernel\nat line 3"), "RuntimeError: no such kernel"),
        # torch raises it for an operator that a device does not have, mostly without a word, and it
        # is a RuntimeError: a refusal of others, though it reads like a gap of ours.
        (NotImplementedError(), "NotImplementedError: no reason given"),
    ],
)
def test_a_reason_is_one_line(error, reason):
    assert isinstance(error, refusals.REFUSALS)
    assert refusals.reason_of(error) == reason


def test_what_is_wrong_in_our_own_code_is_no_refusal():
    for error in (TypeError("x"), KeyError("x"), AttributeError("x"), IndexError("x")):
        assert not isinstance(error, refusals.REFUSALS)
