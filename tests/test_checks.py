"""Checks of single values."""

from __future__ import annotations

import pytest

from sparda_compile.checks import by_layer, names, number, one_of, whole
from sparda_compile.errors import ConfigError


def test_what_is_allowed_passes():
    assert one_of("mode", "a", ("a", "b")) is None
    assert whole("n", 3, 3) is None
    assert whole("n", 3, 0, 3) is None
    assert number("x", 0.5) is None
    assert number("x", 2) is None
    assert names("passes", ("a",)) is None
    assert names("passes", ()) is None


def test_names_of_layers_are_pairs_in_their_order():
    assert by_layer("f", "a", ("a", "b")) == "a"
    pairs = by_layer("f", {3: "b", 0: "a"}, ("a", "b"))
    assert pairs == ((0, "a"), (3, "b"))
    assert by_layer("f", pairs, ("a", "b")) == pairs


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
        (lambda: by_layer("f", {0: "c"}, "ab"), r"f\[0\]='c' is not known; use one of a, b"),
        (lambda: by_layer("f", {-1: "a"}, "ab"), "a layer of f=-1 is too small"),
        (
            lambda: by_layer("f", 8, ("a",)),
            "f=8 is neither a name nor names by layer; use one of a",
        ),
        (lambda: number("x", True), "x=True is not a finite number"),
        (lambda: names("passes", "a"), "passes='a' is not a tuple of names"),
    ],
)
def test_what_is_not_is_named(check, words):
    with pytest.raises(ConfigError, match=words):
        check()
