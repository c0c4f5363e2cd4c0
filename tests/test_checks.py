"""Checks of single values."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
import torch

from sparda_compile.checks import by_layer, flag, names, number, one_of, plain_numbers, whole
from sparda_compile.errors import ConfigError


def test_what_is_allowed_passes():
    assert one_of("mode", "a", ("a", "b")) is None
    assert whole("n", 3, 3) is None
    assert whole("n", 3, 0, 3) is None
    assert number("x", 0.5) is None
    assert number("x", 2) is None
    assert names("passes", ("a",)) is None
    assert names("passes", ()) is None
    assert flag("on", True) is None
    assert flag("on", False) is None


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
        (lambda: one_of("mode", np.array(["a", "b"]), ("a", "b")), "mode=array.* is not known"),
        (lambda: one_of("mode", torch.tensor([1, 2]), ("a",)), "mode=tensor.* is not known"),
        (lambda: flag("on", 1), "on=1 is no switch; use one of True, False"),
        (lambda: flag("on", torch.tensor([1, 0])), "on=tensor.* is no switch"),
        (lambda: flag("on", np.array([True])), "on=array.* is no switch"),
        (lambda: number("x", 10**400), "x=10+ is not a finite number"),
        (lambda: number("x", Fraction(10**400)), "x=Fraction.* is not a finite number"),
        (lambda: whole("n", 10**400, 1), "n=10+ is too large; use 1 to 9223372036854775807"),
    ],
)
def test_what_is_not_is_named(check, words):
    with pytest.raises(ConfigError, match=words):
        check()


def test_numbers_of_other_packages_become_plain_ones():
    @dataclasses.dataclass(frozen=True)
    class Settings:
        values: tuple = (1,)
        count: object = np.int64(3)
        share: object = np.float32(0.5)
        part: object = Fraction(1, 4)
        far: object = Fraction(10**400)
        on: object = True
        name: object = "x"

        def __post_init__(self):
            plain_numbers(self)

    made = dataclasses.astuple(Settings())
    assert made == ((1,), 3, 0.5, 0.25, Fraction(10**400), True, "x")
    assert [type(value) for value in made] == [tuple, int, float, float, Fraction, bool, str]
