"""The prompt's length, as a number that notes what it is compared with.

A forward that does something else for prompts beyond 20,000 tokens compares two numbers in Python,
and a trace shows one side alone. So the length that a shape gives is a `Length`: an int in every
other way, it notes each comparison whose answer other lengths would change.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Length", "Lengths"]

# A prompt has two tokens or more: to tell one from many is what the two programs are for.
_FEWEST: Final = 2


class Lengths:
    """Makes the lengths of one run, and keeps what they were compared with.

    Args:
        tokens: Tokens of the prompt; with less than two nothing is noted.
        where: Returns the line of the model that runs.
    """

    def __init__(self, tokens: int, where: Callable[[], str]) -> None:
        self._tokens = tokens
        self._where = where
        self.compared: dict[int, str] = {}

    def wrap(self, result: Any) -> Any:
        """Return a size or a shape in which the prompt's length takes notes."""
        if self._tokens < _FEWEST:
            return result
        if isinstance(result, torch.Size):
            return torch.Size([self.wrap(size) for size in result])
        if type(result) is int and result == self._tokens:
            return Length(result, self)
        return result

    def note(self, limit: float) -> None:
        """Keep the length at which a comparison changes its answer."""
        self.compared.setdefault(int(limit), self._where())


class Length(int):
    """`factor * T + offset` as an int; with the factor 0, what remains of it in a division."""

    _lengths: Lengths
    _factor: int
    _offset: int

    def __new__(cls, value: int, lengths: Lengths, factor: int = 1, offset: int = 0) -> Length:
        """Return the number."""
        self = super().__new__(cls, value)
        self._lengths, self._factor, self._offset = lengths, factor, offset
        return self

    def _with(self, value: Any, factor: int, offset: int) -> Any:
        is_number = type(value) is int and factor != 0
        return Length(value, self._lengths, factor, offset) if is_number else value

    def __add__(self, other: Any) -> Any:
        factor, offset = _linear(other)
        value = _plain(operator.add, self, other)
        return self._with(value, self._factor + factor, self._offset + offset)

    def __sub__(self, other: Any) -> Any:
        factor, offset = _linear(other)
        value = _plain(operator.sub, self, other)
        return self._with(value, self._factor - factor, self._offset - offset)

    def __mul__(self, other: Any) -> Any:
        factor, times = _linear(other)
        value = _plain(operator.mul, self, other)
        return value if factor else self._with(value, self._factor * times, self._offset * times)

    __radd__ = __add__
    __rmul__ = __mul__

    def __mod__(self, other: Any) -> Any:
        return Length(_plain(operator.mod, self, other), self._lengths, 0)

    def __bool__(self) -> bool:
        return bool(self._compare(operator.ne, 0))

    def __lt__(self, other: Any) -> bool:
        return bool(self._compare(operator.lt, other))

    def __le__(self, other: Any) -> bool:
        return bool(self._compare(operator.le, other))

    def __gt__(self, other: Any) -> bool:
        return bool(self._compare(operator.gt, other))

    def __ge__(self, other: Any) -> bool:
        return bool(self._compare(operator.ge, other))

    def __eq__(self, other: object) -> bool:
        return bool(self._compare(operator.eq, other))

    def __ne__(self, other: object) -> bool:
        return bool(self._compare(operator.ne, other))

    __hash__ = int.__hash__

    def _compare(self, compare: Callable[[Any, Any], Any], other: Any) -> Any:
        is_limit = isinstance(other, (int, float)) and not isinstance(other, (bool, Length))
        if is_limit and self._factor == 0:
            self._lengths.note(other)
        elif is_limit:
            limit = (other - self._offset) / self._factor
            is_any = limit == _FEWEST and compare in (operator.ge, operator.lt)
            if limit >= _FEWEST and not is_any:
                self._lengths.note(limit)
        return _plain(compare, self, other)


def _linear(number: Any) -> tuple[int, int]:
    """Return the factor and the offset of a number."""
    if isinstance(number, Length):
        return number._factor, number._offset
    return 0, int(number) if isinstance(number, int) else 0


def _plain(function: Callable[[Any, Any], Any], one: Any, other: Any) -> Any:
    """Compute with plain numbers: an int's own method would come back here."""
    return function(int(one), int(other) if isinstance(other, Length) else other)
