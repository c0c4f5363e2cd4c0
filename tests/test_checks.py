"""Checks of single values."""

from __future__ import annotations

import pytest

from sparda_compile.checks import names, number, one_of, whole
from sparda_compile.errors import ConfigError


def test_what_is_allowed_passes():
    assert one_of("mode", "a", ("a", "b")) is None
    assert whole("n", 3, 3) is None
    assert whole("n", 3, 0, 3) is None
    assert number("x", 0.5) is None
    assert number("x", 2) is None
    assert names("passes", ("a",)) is None
    assert names("passes", ()) is None


@pytest.mark.parametrize(
    ("check", "words"),
    [
        (lambda: one_of("mode", "forcast", ("forecast",)), "mode='forcast' .* mean 'forecast'"),
        (lambda: one_of("mode", 3, ("query",)), "mode=3 is not known; use one of query"),
        (lambda: whole("n", 2, 3), "n=2 is too small; use 3 or more"),
        (lambda: whole("n", 9, 3, 8), "n=9 is too large; use 3 to 8"),
        (lambda: whole("n", "3", 3), "n='3' is not a whole number"),
        (lambda: whole("n", False, 0), "n=False is not a whole number"),
        (lambda: number("x", float("nan")), "x=nan is not a finite number"),
        (lambda: number("x", True), "x=True is not a finite number"),
        (lambda: names("passes", "a"), "passes='a' is not a tuple of names"),
    ],
)
def test_what_is_not_is_named(check, words):
    with pytest.raises(ConfigError, match=words):
        check()
