"""Checks of single values, each with an error that names the field and what is allowed."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import numbers
from typing import TYPE_CHECKING, Any, Final

from sparda_compile.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

AUTO: Final = "auto"
"""Stands for the format that is chosen where a cache is planned; `auto:PERCENT` says its error."""

__all__ = [
    "AUTO",
    "by_layer",
    "flag",
    "format_choice",
    "names",
    "number",
    "one_of",
    "plain_numbers",
    "whole",
]

# No setting counts further, and 64 bits hold it.
_MOST: Final = (1 << 63) - 1


def one_of(name: str, value: object, allowed: Iterable[object]) -> None:
    """Refuse what is none of the names that are allowed.

    Raises:
        ConfigError: If it is not; the text names the field and what is allowed.
    """
    allowed = tuple(allowed)
    if isinstance(value, str) and value in allowed:  # an array would compare element by element
        return
    names = [str(name) for name in allowed]
    close = difflib.get_close_matches(str(value), names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ConfigError(f"{name}={value!r} is not known; use one of {', '.join(names)}.{hint}")


def flag(name: str, value: object) -> None:
    """Refuse what is neither True nor False.

    Raises:
        ConfigError: If it is not.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r} is no switch; use one of True, False.")


def plain_numbers(settings: Any) -> None:
    """Make numbers of numpy, and of other packages, Python's own: a file can hold those.

    Args:
        settings: A frozen dataclass that is being made; its fields are changed in place.
    """
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            continue
        with contextlib.suppress(OverflowError):  # beyond all floats; `number` refuses it
            own = int(value) if isinstance(value, numbers.Integral) else float(value)
            object.__setattr__(settings, field.name, own)


def whole(name: str, value: object, low: int, high: int | None = None) -> None:
    """Refuse what is no whole number of a range.

    Raises:
        ConfigError: If it is not; the text names the field and what is allowed.
    """
    limits = f"{low} or more" if high is None else f"{low} to {high}"
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise ConfigError(f"{name}={value!r} is not a whole number; use {limits}.")
    if int(value) < low:
        raise ConfigError(f"{name}={value} is too small; use {limits}.")
    most = _MOST if high is None else high
    if int(value) > most:
        raise ConfigError(f"{name}={value} is too large; use {low} to {most}.")


def number(name: str, value: object) -> None:
    """Refuse what is no finite number.

    Raises:
        ConfigError: If it is not; the text names the field and what is allowed.
    """
    try:
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        is_finite = is_number and math.isfinite(value)  # type: ignore[arg-type]
    except OverflowError:  # a whole number beyond all floats
        is_finite = False
    if not is_finite:
        raise ConfigError(f"{name}={value!r} is not a finite number.")


def names(name: str, value: object) -> None:
    """Refuse what is no tuple of names.

    Raises:
        ConfigError: If it is not; the text names the field and what is allowed.
    """
    if not isinstance(value, tuple) or not all(isinstance(each, str) for each in value):
        raise ConfigError(f"{name}={value!r} is not a tuple of names; use for example ('a', 'b').")


def by_layer(
    name: str, value: str | Mapping[int, str] | tuple[tuple[int, str], ...], allowed: Iterable[str]
) -> str | tuple[tuple[int, str], ...]:
    """Return one name for all layers, or those of some layers as pairs in order of the layers.

    Raises:
        ConfigError: If a name is none of those that are allowed, or a layer is no whole number.
    """
    if isinstance(value, str):
        one_of(name, value, allowed)
        return value
    try:
        given = dict(value)
    except (TypeError, ValueError):
        raise ConfigError(
            f"{name}={value!r} is neither a name nor names by layer; use one of "
            f"{', '.join(allowed)}, or a dict such as {{0: 'int8'}}."
        ) from None
    for layer, chosen in given.items():
        whole(f"a layer of {name}", layer, 0)
        one_of(f"{name}[{layer}]", chosen, allowed)
    return tuple(sorted((int(layer), chosen) for layer, chosen in given.items()))


def format_choice(
    name: str, value: str | Mapping[int, str] | tuple[tuple[int, str], ...], allowed: Iterable[str]
) -> str | tuple[tuple[int, str], ...]:
    """Return what `by_layer` does, or `auto` or `auto:PERCENT` as it is.

    Raises:
        ConfigError: If it is none of these, or the percent is no number above 0 and up to 100.
    """
    allowed = tuple(allowed)
    if not isinstance(value, str) or value.partition(":")[0] != AUTO:
        return by_layer(name, value, (*allowed, AUTO) if isinstance(value, str) else allowed)
    _, colon, percent = value.partition(":")
    try:
        is_right = not colon or 0.0 < float(percent) <= 100.0
    except ValueError:
        is_right = False
    if not is_right:
        raise ConfigError(
            f"{name}={value!r} does not say which error is allowed; use 'auto', or for example "
            "'auto:10' for formats whose error is up to 10% of the numbers' size."
        )
    return value
